#pragma once

// The real mvgpu-backend on a socket in a directory of the test's own, and clients that speak
// vfio-user to it. MVGPU_BACKEND is the program's path.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/backend/child_process.h"
#include "tests/backend/gpu_guest.h"
#include "tests/backend/raw_trace.h"
#include "tests/backend/remote_device.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::testing {

// A VMM with a guest in it.
struct RemoteVm {
  explicit RemoteVm(UniqueFd socket)
      : device(std::move(socket)), guest(&device, [this] {
          device.answer_dma();
          return wait_briefly();
        }) {
    device.set_memory(GpuGuest::kRam, guest.ram().bytes());
  }

  // Through VERSION, mappings and the guest's driver.
  bool start() {
    return device.negotiate() && guest.map_low().has_value() && guest.map_pictures().has_value() &&
           guest.boot();
  }
  // False when this VM has lasted too long for a test.
  bool wait_briefly() const {
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    return std::chrono::steady_clock::now() < give_up;
  }

  const std::chrono::steady_clock::time_point give_up =
      std::chrono::steady_clock::now() + std::chrono::seconds(60);
  RemoteDevice device;
  GpuGuest guest;
};

class BackendTest : public ::testing::Test {
 protected:
  static constexpr uint32_t kOk = wire::kOk;
  static constexpr char kVmUuid[] = "01234567-89ab-cdef-0123-456789abcdef";
  static constexpr char kWaiting[] = "waiting for a vmm";
  static constexpr char kNothingLeft[] =
      "0 pages mapped, 0 pinned, 0 charged, 0 cached, 0 resources left";

  std::string socket_path() const { return dir_ / "vgpu.sock"; }
  std::string runtime_dir() const { return dir_ / "run"; }
  // Paths are appended to these.
  std::vector<std::string> Command(std::vector<std::string> more = {}) const {
    std::vector<std::string> command = {MVGPU_BACKEND, "--runtime-dir=" + runtime_dir()};
    command.insert(command.end(), more.begin(), more.end());
    return command;
  }
  // Starts it and waits until a VMM may come.
  void Start(std::vector<std::string> more = {}) {
    more.push_back("--socket-path=" + socket_path());
    backend_ = std::make_unique<ChildProcess>(Command(std::move(more)));
    ASSERT_NE(backend_->wait_for_err(kWaiting), std::string::npos) << backend_->err();
  }
  std::unique_ptr<RemoteVm> ConnectVm() {
    UniqueFd socket = ConnectTo(socket_path());
    EXPECT_TRUE(socket.is_valid());
    return std::make_unique<RemoteVm>(std::move(socket));
  }
  std::unique_ptr<RemoteVm> StartVm() {
    auto vm = ConnectVm();
    EXPECT_TRUE(vm->start());
    return vm;
  }
  // Waits for the end of a VM, which must have left nothing, and for the backend to listen again.
  void ExpectVmGone() {
    const size_t said = backend_->wait_for_err("the vm is gone", seen_);
    ASSERT_NE(said, std::string::npos) << backend_->err();
    const size_t waits = backend_->wait_for_err(kWaiting, said);
    ASSERT_NE(waits, std::string::npos) << backend_->err();
    const std::string line = backend_->err().substr(said, waits - said);
    EXPECT_THAT(line, ::testing::HasSubstr(kNothingLeft));
    seen_ = waits;
  }
  // A whole VM, to see that the backend still does its work.
  void ExpectServes() {
    auto vm = StartVm();
    EXPECT_TRUE(vm->guest.draw(1, 1));
    vm.reset();
    ExpectVmGone();
  }
  void ExpectLeaves(int exit_code) { EXPECT_EQ(backend_->wait(), exit_code) << backend_->err(); }

  TempDir dir_;
  std::unique_ptr<ChildProcess> backend_;
  size_t seen_ = 0;  // of its standard error
};

}  // namespace mvgpu::testing
