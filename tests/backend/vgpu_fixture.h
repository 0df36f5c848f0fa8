#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backend/trace/trace_writer.h"
#include "backend/vgpu.h"
#include "tests/backend/gpu_guest.h"
#include "tests/backend/raw_trace.h"
#include "tests/backend/temp_dir.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::backend {

// A vGPU in this process with a guest in front of it, in one thread: the device works while the
// guest waits. Ends as a VM does, and then nothing may be left.
class VgpuTest : public ::testing::Test, protected Vgpu::Owner {
 protected:
  static constexpr uint32_t kOk = testing::wire::kOk;

  // An observer is needed before SetUp(): called there.
  virtual SessionObserver* observer() { return nullptr; }

  // Who is asked for memory without a file; called in SetUp(), too.
  virtual domain::RemoteMemory* remote() { return nullptr; }

  // The IOMMU that the guest sees; called in SetUp(), too. None: commands have guest addresses.
  virtual std::optional<GuestIommu::Options> iommu() { return std::nullopt; }

  VgpuTest() { config_.pin = PinMode::kNone; }

  void SetUp() override { MakeVgpu(); }
  void TearDown() override {
    guest_.reset();
    if (vgpu_ != nullptr && !has_ended_) EndVm();
    vgpu_.reset();
  }

  void MakeVgpu() {
    auto parts = Vgpu::MakeParts(config_);
    ASSERT_THAT(parts, testing::IsOk());
    parts->remote = remote();
    parts->iommu = iommu();
    if (mapper_ != nullptr) parts->mapper = std::move(mapper_);
    auto vgpu = Vgpu::Create(config_, std::move(*parts), observer(), this);
    ASSERT_THAT(vgpu, testing::IsOk());
    vgpu_ = std::move(*vgpu);
    guest_ = std::make_unique<testing::GpuGuest>(vgpu_.get(), [this] { return Wait(); });
  }
  void StartGuest() {
    ASSERT_THAT(guest_->map_low(), testing::IsOk());
    ASSERT_THAT(guest_->map_pictures(), testing::IsOk());
    ASSERT_TRUE(guest_->boot());
  }
  // What the server does when the VMM has gone.
  void EndVm() {
    has_ended_ = true;
    vgpu_->reset();
    EXPECT_THAT(vgpu_->dma_unmap_all(), testing::IsOk());
    EXPECT_TRUE(vgpu_->counters().all_released());
  }
  // What the guest does after a doorbell until there is an answer; false: it gives up.
  virtual bool Wait() { return StepAll(); }
  // Does all work of both queues; false when there was none.
  bool StepAll() {
    bool any = false;
    for (const uint16_t queue : {uint16_t{0}, uint16_t{1}}) {
      while (vgpu_->step(queue)) any = true;
    }
    return any;
  }

  void on_doorbell(uint16_t queue) override { doorbells_.push_back(queue); }
  void on_queue_error(uint16_t, const Error& error) override {
    queue_errors_.push_back(error.message());
  }
  void on_queue_waiting(uint16_t queue, const Error&) override { waiting_.push_back(queue); }
  void on_refused(const Error& error) override { refusals_.push_back(error.message()); }
  void on_unsealed_memory(IovaRange range) override { unsealed_.push_back(range); }
  void on_remote_memory(Iova first) override { remote_.push_back(first); }
  void on_moved_pages(uint64_t pages) override { moved_.push_back(pages); }

  VgpuConfig config_;
  std::unique_ptr<dma::Mapper> mapper_;  // that SetUp() takes; null: the one of config_
  std::vector<uint16_t> doorbells_;
  std::vector<std::string> queue_errors_;
  std::vector<uint16_t> waiting_;
  std::vector<std::string> refusals_;
  std::vector<IovaRange> unsealed_;
  std::vector<Iova> remote_;
  std::vector<uint64_t> moved_;
  std::unique_ptr<Vgpu> vgpu_;
  std::unique_ptr<testing::GpuGuest> guest_;
  bool has_ended_ = false;
};

// The same with a recorder, and a session that has a bit of everything in it.
class RecordedVgpuTest : public VgpuTest {
 protected:
  SessionObserver* observer() override {
    auto writer = TraceWriter::Create(trace_path());
    EXPECT_THAT(writer, testing::IsOk());
    writer_ = std::move(*writer);
    writer_->session(config_.to_json());
    return writer_.get();
  }
  std::string trace_path() const { return dir_ / "session.mvtrace"; }

  // Two resources, a picture that changes, memory taken away and given back under an attached
  // resource, a guest error, the cursor, a reset and a second driver.
  void RunSession() {
    StartGuest();
    vgpu_->bind_irqs(glue::kIrqMsix, 0, std::vector<UniqueFd>(3));
    ASSERT_TRUE(guest_->draw(1, 3));
    ASSERT_THAT(guest_->unmap_pictures(), testing::IsOk());
    EXPECT_NE(guest_->transfer(1), kOk);
    ASSERT_THAT(guest_->map_pictures(), testing::IsOk());
    guest_->paint(77);
    EXPECT_EQ(guest_->transfer(1), kOk);
    EXPECT_EQ(guest_->flush(1), kOk);
    EXPECT_EQ(guest_->create(2), kOk);
    EXPECT_EQ(guest_->attach(2, {{testing::GpuGuest::kPictures + 4096, 8192},
                                 {testing::GpuGuest::kPictures + 65536, 4096}}),
              kOk);
    EXPECT_EQ(guest_->transfer(2), kOk);
    EXPECT_NE(guest_->transfer(99), kOk) << "there is no such resource";
    EXPECT_TRUE(guest_->move_cursor(10, 20));
    ASSERT_THAT(vgpu_->dma_unmap(Iova(testing::GpuGuest::kRam), testing::GpuGuest::kLowSize),
                testing::IsOk());
    guest_->ring_control();
    StepAll();
    ASSERT_THAT(guest_->map_low(), testing::IsOk());
    EXPECT_EQ(guest_->detach(2), kOk);
    EXPECT_EQ(guest_->unref(2), kOk);
    ASSERT_TRUE(guest_->boot());  // begins with a reset
    ASSERT_TRUE(guest_->draw(5, 2));
  }
  void EndSession() {
    EndVm();
    summary_ = vgpu_->session_json();
    ASSERT_THAT(writer_->finish(summary_), testing::IsOk());
  }
  // The records of the finished session.
  std::vector<testing::RawRecord> Records() {
    auto records = testing::DecodeTrace(testing::ReadFile(trace_path()));
    EXPECT_TRUE(records.has_value());
    return records.value_or(std::vector<testing::RawRecord>{});
  }

  testing::TempDir dir_;
  std::unique_ptr<TraceWriter> writer_;
  std::string summary_;
};

}  // namespace mvgpu::backend
