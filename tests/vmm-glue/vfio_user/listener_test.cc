#include "vmm-glue/vfio_user/listener.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>

#include "tests/fakes/result_matchers.h"

namespace mvgpu::testing {
namespace {

namespace fs = std::filesystem;
using glue::vfio_user::Listener;

class ListenerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    char directory[] = "/tmp/mvgpu-XXXXXX";
    ASSERT_NE(mkdtemp(directory), nullptr);
    directory_ = directory;
    path_ = directory_ / "vgpu.sock";
  }
  void TearDown() override { fs::remove_all(directory_); }

  std::unique_ptr<Listener> Listen() {
    auto listener = Listener::Create(path_.string());
    EXPECT_THAT(listener, IsOk());
    return listener ? std::move(*listener) : nullptr;
  }
  bool CanConnect() {
    const UniqueFd client = Client();
    return client.is_valid();
  }
  UniqueFd Client() {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path_.string().copy(address.sun_path, sizeof(address.sun_path) - 1);
    UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) fd.reset();
    return fd;
  }
  mode_t Mode() {
    struct stat found {};
    EXPECT_EQ(lstat(path_.c_str(), &found), 0);
    return found.st_mode & ALLPERMS;
  }

  fs::path directory_;
  fs::path path_;
};

TEST_F(ListenerTest, AcceptsAClientAndNeverWaitsForOne) {
  const auto listener = Listen();
  auto nobody = listener->accept();
  ASSERT_THAT(nobody, IsOk());
  EXPECT_FALSE(nobody->is_valid());

  const UniqueFd client = Client();
  auto accepted = listener->accept();
  ASSERT_THAT(accepted, IsOk());
  ASSERT_TRUE(accepted->is_valid());
  EXPECT_EQ(write(client.get(), "x", 1), 1);
  char byte = 0;
  EXPECT_EQ(read(accepted->get(), &byte, 1), 1);
}

TEST_F(ListenerTest, OnlyTheOwnerMayConnectWhateverTheUmask) {
  for (const mode_t mask : {0000u, 0022u, 0077u, 0777u}) {
    const mode_t before = umask(mask);
    const auto listener = Listen();
    umask(before);
    EXPECT_EQ(Mode(), 0600u) << mask;
  }
}

TEST_F(ListenerTest, RemovesItsFileAtTheEnd) {
  { const auto listener = Listen(); }
  EXPECT_FALSE(fs::exists(path_));
}

TEST_F(ListenerTest, LeavesAFileThatReplacedItsOwn) {
  {
    const auto first = Listen();
    fs::remove(path_);
    const auto second = Listen();
    EXPECT_TRUE(CanConnect());
    fs::rename(path_, directory_ / "elsewhere.sock");
    std::ofstream(path_) << "not ours";
  }
  EXPECT_TRUE(fs::is_regular_file(path_));
}

TEST_F(ListenerTest, ReplacesASocketThatNobodyListensOn) {
  {
    const auto dead = Listen();
    fs::create_hard_link(path_, directory_ / "kept");
  }
  fs::rename(directory_ / "kept", path_);
  ASSERT_TRUE(fs::is_socket(path_));
  ASSERT_FALSE(CanConnect());
  const auto listener = Listen();
  EXPECT_TRUE(CanConnect());
}

TEST_F(ListenerTest, RefusesAPathWhereSomebodyListens) {
  const auto first = Listen();
  EXPECT_THAT(Listener::Create(path_.string()), FailsWith(ErrorCode::kBusy));
  EXPECT_TRUE(CanConnect());
}

// With a full queue the probe is told to try again, which also means that somebody is there.
TEST_F(ListenerTest, RefusesAPathWhereSomebodyListensButDoesNotAccept) {
  const auto first = Listen();
  const UniqueFd waiting = Client();
  const UniqueFd also_waiting = Client();
  EXPECT_THAT(Listener::Create(path_.string()), FailsWith(ErrorCode::kBusy));
  EXPECT_TRUE(fs::is_socket(path_));
}

TEST_F(ListenerTest, RefusesAPathThatIsNoSocket) {
  std::ofstream(path_) << "precious";
  EXPECT_THAT(Listener::Create(path_.string()), FailsWith(ErrorCode::kInvalid));
  EXPECT_EQ(fs::file_size(path_), 8u);

  const fs::path link = directory_ / "link";
  fs::create_symlink(path_, link);
  EXPECT_THAT(Listener::Create(link.string()), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Listener::Create(directory_.string()), FailsWith(ErrorCode::kInvalid));
}

TEST_F(ListenerTest, RefusesPathsThatAreEmptyTooLongOrNowhere) {
  EXPECT_THAT(Listener::Create(""), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Listener::Create(std::string("\0abstract", 9)), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(Listener::Create((directory_ / "missing" / "s").string()),
              FailsWith(ErrorCode::kSystem));

  const std::string prefix = directory_.string() + "/";
  const auto too_long = Listener::Create(prefix + std::string(108 - prefix.size(), 'x'));
  ASSERT_THAT(too_long, FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(too_long.error().message(), ::testing::HasSubstr("108 bytes, at most 107"));
  EXPECT_THAT(Listener::Create(prefix + std::string(107 - prefix.size(), 'x')), IsOk());
}

}  // namespace
}  // namespace mvgpu::testing
