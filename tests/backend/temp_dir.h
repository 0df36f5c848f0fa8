#pragma once

#include <stdlib.h>

#include <filesystem>
#include <string>

#include "apionly-domain/base/check.h"

namespace mvgpu::testing {

// A directory of the test's own (mode 0700), gone with everything in it at the end.
class TempDir {
 public:
  TempDir() {
    char path[] = "/tmp/mvgpu-test-XXXXXX";
    MVGPU_CHECK(mkdtemp(path) != nullptr);
    path_ = path;
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

}  // namespace mvgpu::testing
