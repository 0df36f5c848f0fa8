#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "apionly-domain/base/error.h"
#include "backend/replay/page_account.h"
#include "backend/replay/replay_memory.h"
#include "backend/session_observer.h"
#include "backend/trace/trace_reader.h"
#include "backend/vgpu.h"

namespace mvgpu::backend {

// Plays a trace into a vGPU that is made as the trace says: the same registers, mappings, guest
// bytes and steps in the same order, through the same code. What comes out is compared with what
// the trace says came out; differences are counted, the first few are described. With another idle
// list than the recorded one pages stay pinned and mapped longer or shorter: counts of pins and of
// the cache are not compared then. Not thread-safe; a Player plays once.
class Player final : private SessionObserver, private Vgpu::Owner {
 public:
  static constexpr size_t kMaxDescribedDifferences = 10;
  struct Options {
    PinMode pin = PinMode::kNone;
    DmaMode dma = DmaMode::kNone;
    std::string iommu_group{};                 // with DmaMode::kIommu
    std::string vulkan_device{};               // with DmaMode::kVulkan
    std::string vfio_device{};                 // with DmaMode::kIommu
    std::optional<uint64_t> dma_idle_bytes{};  // nullopt: as it was recorded
  };
  struct Outcome {
    uint64_t records = 0;
    uint64_t steps = 0;
    uint64_t duration_ns = 0;  // of the recorded session
    bool is_complete = false;  // the trace has its summary
    uint64_t differences = 0;
    std::vector<std::string> described;  // the first kMaxDescribedDifferences
    std::vector<uint64_t> frame_hashes;
    uint64_t peak_unique_pages = 0;
    dma::Mapper::Figures mapper_figures;  // at the end
    std::string counters_json;            // Vgpu::Counters::session_json() at the end
    bool all_released = false;
    bool are_pins_compared = true;
  };

  // `reader` outlives the player. Errors: kCorrupt (no session record first), those of
  // Vgpu::Create().
  static Result<std::unique_ptr<Player>> Create(TraceReader* reader, Options options);
  ~Player() override;

  // `on_progress` (may be empty) is called now and then. Errors: kCorrupt when the trace makes no
  // sense.
  Result<Outcome> play(const std::function<void()>& on_progress);

  const gpu::Screenshot& picture() const { return vgpu_->picture(); }
  const PageAccount& pages() const { return account_; }
  const VgpuConfig& config() const { return vgpu_->config(); }
  // As they were recorded.
  const TraceAccounts& recorded_accounts() const { return recorded_accounts_; }

 private:
  // Something that came out, or should: a request, a response or a frame.
  struct Event {
    TraceType type;
    std::vector<std::byte> bytes;
    bool operator==(const Event&) const = default;
  };

  explicit Player(TraceReader* reader) : reader_(*reader) {}
  Result<void> Play(const TraceRecord& record);
  Result<void> PlayMap(ByteReader& payload);
  Result<void> PlayUnmap(ByteReader& payload);
  Result<void> PlayRegister(const TraceRecord& record, ByteReader& payload);
  Result<void> PlayIrqs(ByteReader& payload);
  Result<void> PlayStep(ByteReader& payload);
  Result<void> PlayAccounts(const TraceRecord& record);
  Result<void> PlaySummary(const TraceRecord& record);
  void ReleaseEverything();
  // Whether a number of the summary is to be as recorded.
  bool IsCompared(std::string_view key) const;
  void Differ(std::string what);
  Error Corrupt(std::string_view what) const;

  void on_doorbell(uint16_t) override {}  // the trace says when a queue is served
  void on_queue_waiting(uint16_t, const Error&) override {}
  void on_refused(const Error&) override {}
  void on_unsealed_memory(IovaRange) override {}
  void on_remote_memory(Iova) override {}
  void on_moved_pages(uint64_t) override {}                // nobody asks for a look
  void on_queue_error(uint16_t, const Error&) override {}  // the trace has it, too
  void on_map(IovaRange, domain::Access, const Backing&) override {}
  void on_unmap(Iova, uint64_t) override {}
  void on_unmap_all() override {}
  void on_region_write(uint32_t, uint64_t, std::span<const std::byte>) override {}
  void on_region_read(uint32_t, uint64_t, std::span<const std::byte>) override {}
  void on_irqs(uint32_t, TraceIrqOp, uint32_t, uint32_t) override {}
  void on_reset() override {}
  void on_step(uint16_t) override {}
  void on_request(uint16_t queue, std::span<const std::byte> bytes) override;
  void on_response(uint16_t queue, std::span<const std::byte> bytes) override;
  void on_frame(uint32_t scanout, gpu::Size size, uint64_t hash) override;
  void on_accounts(const AccountFigures& figures) override { accounts_ = figures; }
  void on_guest_read(Iova iova, std::span<const std::byte> bytes) override;

  TraceReader& reader_;  // outlives this, see Create()
  ReplayMemory memory_;
  PageAccount account_{&memory_};
  std::unique_ptr<Vgpu> vgpu_;
  std::vector<Event> expected_;  // of the step that comes
  std::vector<Event> actual_;
  AccountFigures accounts_;  // of our own vGPU
  TraceAccounts recorded_accounts_;
  Outcome outcome_;
};

}  // namespace mvgpu::backend
