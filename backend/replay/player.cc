#include "backend/replay/player.h"

#include <fmt/format.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <array>
#include <utility>

#include <nlohmann/json.hpp>

#include "backend/trace/trace_json.h"

namespace mvgpu::backend {

namespace {

using nlohmann::json;

// A request, a response and a frame on each of 16 scanouts, with room to spare.
constexpr size_t kMaxResultsPerStep = 64;

std::vector<std::byte> EventBytes(std::initializer_list<uint64_t> numbers,
                                  std::span<const std::byte> bytes) {
  ByteWriter writer;
  for (const uint64_t number : numbers) writer.varint(number);
  writer.bytes(bytes);
  return {writer.view().begin(), writer.view().end()};
}

}  // namespace

Result<std::unique_ptr<Player>> Player::Create(TraceReader* reader, Options options) {
  MVGPU_ASSIGN_OR_RETURN(const auto first, reader->next());
  if (!first || first->type != TraceType::kSession) {
    return Fail(ErrorCode::kCorrupt,
                fmt::format("{} does not begin with a session record", reader->name()));
  }
  ByteReader payload(first->payload);
  MVGPU_ASSIGN_OR_RETURN(VgpuConfig config, VgpuConfig::FromJson(payload.rest_as_text()));
  config.name = "replay";
  config.pin = options.pin;
  config.dma = options.dma;
  config.vulkan_device = options.vulkan_device;
  config.iommu_group = options.iommu_group;
  config.vfio_device = options.vfio_device;
  std::unique_ptr<Player> player(new Player(reader));
  const uint64_t recorded_idle_bytes = config.dma_idle_bytes;
  config.dma_idle_bytes = options.dma_idle_bytes.value_or(recorded_idle_bytes);
  player->outcome_.are_pins_compared =
      PagesIn(config.dma_idle_bytes) == PagesIn(recorded_idle_bytes);
  player->recorded_accounts_.on_session(payload.rest_as_text());
  MVGPU_ASSIGN_OR_RETURN(Vgpu::Parts parts, Vgpu::MakeParts(config));
  parts.mapper = player->account_.Watch(std::move(parts.mapper));
  parts.remote = &player->memory_;
  MVGPU_ASSIGN_OR_RETURN(
      player->vgpu_, Vgpu::Create(std::move(config), std::move(parts), player.get(), player.get()));
  player->outcome_.records = 1;
  return player;
}

Player::~Player() {
  if (vgpu_ != nullptr) ReleaseEverything();
}

void Player::ReleaseEverything() {
  vgpu_->reset();
  [[maybe_unused]] const auto unmapped = vgpu_->dma_unmap_all();
}

Result<Player::Outcome> Player::play(const std::function<void()>& on_progress) {
  while (true) {
    MVGPU_ASSIGN_OR_RETURN(const auto record, reader_.next());
    if (!record) break;
    ++outcome_.records;
    outcome_.duration_ns = record->time_ns;
    account_.set_time(record->time_ns);
    MVGPU_RETURN_IF_ERROR(Play(*record));
    if (on_progress && outcome_.records % 256 == 0) on_progress();
  }
  if (!outcome_.is_complete) ReleaseEverything();  // the trace ends where its writer was killed
  const Vgpu::Counters counters = vgpu_->counters();
  outcome_.all_released = counters.all_released();
  outcome_.counters_json = vgpu_->session_json();
  outcome_.mapper_figures = vgpu_->mapper_figures();
  outcome_.peak_unique_pages = counters.domain.peak_unique_pages;
  return outcome_;
}

Result<void> Player::Play(const TraceRecord& record) {
  ByteReader payload(record.payload);
  switch (record.type) {
    case TraceType::kSession:
      return tl::unexpected<Error>(Corrupt("a second session record"));
    case TraceType::kMap:
      return PlayMap(payload);
    case TraceType::kUnmap:
      return PlayUnmap(payload);
    case TraceType::kUnmapAll:
      memory_.unmap_all();
      MVGPU_RETURN_IF_ERROR(vgpu_->dma_unmap_all());
      return {};
    case TraceType::kWrite:
    case TraceType::kRead:
      return PlayRegister(record, payload);
    case TraceType::kIrqs:
      return PlayIrqs(payload);
    case TraceType::kReset:
      vgpu_->reset();
      return {};
    case TraceType::kMemory: {
      const auto iova = payload.varint();
      if (!iova) return tl::unexpected<Error>(Corrupt("a memory record without an address"));
      return memory_.put(Iova(*iova), payload.rest());
    }
    case TraceType::kStep:
      return PlayStep(payload);
    case TraceType::kRequest:
    case TraceType::kResponse:
    case TraceType::kFrame:
      if (expected_.size() >= kMaxResultsPerStep) {
        return tl::unexpected<Error>(
            Corrupt(fmt::format("more than {} results of one step", kMaxResultsPerStep)));
      }
      expected_.push_back({record.type, {record.payload.begin(), record.payload.end()}});
      return {};
    case TraceType::kSummary:
      return PlaySummary(record);
    case TraceType::kAccounts:
      return PlayAccounts(record);
  }
  return {};
}

Result<void> Player::PlayMap(ByteReader& payload) {
  std::array<uint64_t, 6> field = {};  // iova, size, access, file, offset, file size
  for (uint64_t& value : field) {
    const auto number = payload.varint();
    if (!number) return tl::unexpected<Error>(Corrupt("a map record is too short"));
    value = *number;
  }
  const auto [iova, size, access, file, offset, file_size] = field;
  const auto range = IovaRange::FromStartAndSize(Iova(iova), size);
  if (!range || access < 1 || access > 3) {
    return tl::unexpected<Error>(
        Corrupt(fmt::format("a map of iova {:#x} size {:#x} access {}", iova, size, access)));
  }
  domain::Container::MapRequest request{Iova(iova), size, static_cast<domain::Access>(access),
                                        UniqueFd(), offset};
  if (file != 0) {
    MVGPU_ASSIGN_OR_RETURN(request.fd, memory_.open_file(file, file_size));
  }
  MVGPU_RETURN_IF_ERROR(vgpu_->dma_map(std::move(request)));
  memory_.map(*range, file, offset);
  return {};
}

Result<void> Player::PlayUnmap(ByteReader& payload) {
  const auto iova = payload.varint();
  const auto size = payload.varint();
  if (!iova || !size) return tl::unexpected<Error>(Corrupt("an unmap record is too short"));
  memory_.unmap(Iova(*iova), *size);
  MVGPU_RETURN_IF_ERROR(vgpu_->dma_unmap(Iova(*iova), *size));
  return {};
}

Result<void> Player::PlayRegister(const TraceRecord& record, ByteReader& payload) {
  const auto region = payload.varint();
  const auto offset = payload.varint();
  if (!region || !offset || *region >= glue::kRegionCount) {
    return tl::unexpected<Error>(Corrupt("a register record without a region"));
  }
  const auto index = static_cast<uint32_t>(*region);
  const auto data = payload.rest();
  const auto end = CheckedAdd(*offset, data.size());
  if (!end || *end > vgpu_->region_info(index).size) {
    Differ(fmt::format("region {} offset {:#x} does not exist any more", index, *offset));
    return {};
  }
  if (record.type == TraceType::kWrite) {
    vgpu_->region_write(index, *offset, data);
    return {};
  }
  std::vector<std::byte> answer(data.size());
  vgpu_->region_read(index, *offset, answer);
  if (!std::equal(answer.begin(), answer.end(), data.begin())) {
    Differ(fmt::format("region {} offset {:#x} reads differently", index, *offset));
  }
  return {};
}

Result<void> Player::PlayIrqs(ByteReader& payload) {
  std::array<uint64_t, 4> field = {};  // irq, operation, start, count
  for (uint64_t& value : field) {
    const auto number = payload.varint();
    if (!number || *number > UINT32_MAX)
      return tl::unexpected<Error>(Corrupt("an irq record is malformed"));
    value = *number;
  }
  const auto irq = static_cast<uint32_t>(field[0]);
  const auto start = static_cast<uint32_t>(field[2]);
  const auto count = static_cast<uint32_t>(field[3]);
  if (irq >= glue::kIrqCount || uint64_t{start} + count > vgpu_->irq_info(irq).count) {
    Differ(fmt::format("irq {} vectors {}+{} do not exist any more", irq, start, count));
    return {};
  }
  switch (static_cast<TraceIrqOp>(field[1])) {
    case TraceIrqOp::kBind:
    case TraceIrqOp::kUnbind: {
      std::vector<UniqueFd> eventfds(count);
      for (UniqueFd& fd : eventfds) {
        if (static_cast<TraceIrqOp>(field[1]) == TraceIrqOp::kBind) {
          fd.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
        }
      }
      vgpu_->bind_irqs(irq, start, std::move(eventfds));
      return {};
    }
    case TraceIrqOp::kDisable:
      vgpu_->disable_irqs(irq);
      return {};
    case TraceIrqOp::kTrigger:
    case TraceIrqOp::kMask:
    case TraceIrqOp::kUnmask:
      if (count == 0) return {};
      if (static_cast<TraceIrqOp>(field[1]) == TraceIrqOp::kTrigger) {
        vgpu_->trigger_irq(irq, start);
      } else {
        vgpu_->set_irq_masked(irq, start, static_cast<TraceIrqOp>(field[1]) == TraceIrqOp::kMask);
      }
      return {};
  }
  return tl::unexpected<Error>(Corrupt(fmt::format("irq operation {}", field[1])));
}

Result<void> Player::PlayStep(ByteReader& payload) {
  const auto queue = payload.varint();
  if (!queue || *queue > UINT16_MAX)
    return tl::unexpected<Error>(Corrupt("a step without a queue"));
  actual_.clear();
  vgpu_->step(static_cast<uint16_t>(*queue));
  ++outcome_.steps;
  const size_t common = std::min(actual_.size(), expected_.size());
  for (size_t i = 0; i < common; ++i) {
    if (actual_[i] == expected_[i]) continue;
    Differ(fmt::format("step {} on queue {}: {} instead of {}{}", outcome_.steps, *queue,
                       TraceTypeName(actual_[i].type), TraceTypeName(expected_[i].type),
                       actual_[i].type == expected_[i].type ? " with other contents" : ""));
  }
  if (actual_.size() != expected_.size()) {
    Differ(fmt::format("step {} on queue {}: {} results instead of {}", outcome_.steps, *queue,
                       actual_.size(), expected_.size()));
  }
  expected_.clear();
  return {};
}

Result<void> Player::PlayAccounts(const TraceRecord& record) {
  const auto recorded = AccountFigures::FromPayload(record.payload);
  if (!recorded) return tl::unexpected<Error>(Corrupt("an accounts record is too short"));
  recorded_accounts_.on_figures(record.time_ns, *recorded);
  if (!outcome_.are_pins_compared || recorded->is_same_session(accounts_)) return {};
  Differ(fmt::format("{} pages mapped, {} pinned, {} unique instead of {}, {}, {}",
                     accounts_.mapped_pages, accounts_.pinned_pages, accounts_.unique_pages,
                     recorded->mapped_pages, recorded->pinned_pages, recorded->unique_pages));
  return {};
}

Result<void> Player::PlaySummary(const TraceRecord& record) {
  ByteReader payload(record.payload);
  const auto expected = ParseTraceJson(payload.rest_as_text());
  if (!expected) return tl::unexpected<Error>(Corrupt("the summary is not a flat JSON object"));
  if (!expected_.empty()) {
    Differ(fmt::format("{} results after the last step", expected_.size()));
  }
  const json actual = json::parse(vgpu_->session_json());
  for (const auto& [key, value] : expected->items()) {
    if (!IsCompared(key)) continue;
    const json mine = actual.value(key, json());
    if (mine != value) {
      // Quoted where it is no name of ours: the file may hold anything.
      Differ(fmt::format("{} is {} instead of {}", actual.contains(key) ? key : json(key).dump(),
                         mine.dump(), value.dump()));
    }
  }
  outcome_.is_complete = true;
  return {};
}

bool Player::IsCompared(std::string_view key) const {
  if (outcome_.are_pins_compared) return true;
  static constexpr std::array<std::string_view, 5> kOfPins = {
      "pin_calls", "pages_pinned", "pages_pinned_first", "peak_unique_pages", "revocations"};
  return !key.starts_with("dma_") && std::ranges::find(kOfPins, key) == kOfPins.end();
}

void Player::Differ(std::string what) {
  if (++outcome_.differences <= kMaxDescribedDifferences) {
    outcome_.described.push_back(fmt::format("record {}: {}", outcome_.records, what));
  }
}

Error Player::Corrupt(std::string_view what) const {
  return Error(ErrorCode::kCorrupt,
               fmt::format("{}: record {}: {}", reader_.name(), outcome_.records, what));
}

void Player::on_request(uint16_t queue, std::span<const std::byte> bytes) {
  actual_.push_back({TraceType::kRequest, EventBytes({queue}, bytes)});
}

void Player::on_response(uint16_t queue, std::span<const std::byte> bytes) {
  actual_.push_back({TraceType::kResponse, EventBytes({queue}, bytes)});
}

void Player::on_frame(uint32_t scanout, gpu::Size size, uint64_t hash) {
  ByteWriter writer;
  writer.varint(scanout);
  writer.varint(size.width);
  writer.varint(size.height);
  writer.fixed64(hash);
  actual_.push_back({TraceType::kFrame, {writer.view().begin(), writer.view().end()}});
  outcome_.frame_hashes.push_back(hash);
}

void Player::on_guest_read(Iova iova, std::span<const std::byte> bytes) {
  account_.on_read(iova, bytes.size());
}

}  // namespace mvgpu::backend
