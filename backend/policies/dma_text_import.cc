#include "backend/policies/dma_text_import.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace mvgpu::backend {

namespace {

constexpr size_t kMaxLine = 1 << 16;
constexpr uint64_t kGiB = uint64_t{1} << 30;

std::optional<uint64_t> ParseNumber(std::string_view text, int base) {
  if (text.starts_with("0x")) {
    text.remove_prefix(2);
    base = 16;
  }
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// `seconds.micros` or `seconds.nanos`, in ns.
std::optional<uint64_t> ParseSeconds(std::string_view text) {
  const size_t dot = text.find('.');
  if (dot == std::string_view::npos) return std::nullopt;
  const std::string_view digits = text.substr(dot + 1);
  const auto seconds = ParseNumber(text.substr(0, dot), 10);
  auto fraction = ParseNumber(digits, 10);
  if (!seconds || !fraction || digits.size() > 9) return std::nullopt;
  for (size_t i = digits.size(); i < 9; ++i) *fraction *= 10;
  const auto ns = CheckedMul(*seconds, 1'000'000'000);
  return ns ? CheckedAdd(*ns, *fraction) : std::nullopt;
}

// One event, cut out of its line. `fields` is what stands behind the colon.
struct EventLine {
  std::string_view event;
  std::string_view fields;
  uint64_t time_ns = 0;
};

// What comes before the event is `... seconds.micros: `, and perf's `dma:`; names of tasks may hold
// anything, so it is read from the right.
std::optional<EventLine> FindEvent(std::string_view line) {
  for (size_t at = line.find("dma_"); at != std::string_view::npos;
       at = line.find("dma_", at + 1)) {
    std::string_view before = line.substr(0, at);
    if (before.ends_with("dma:")) before.remove_suffix(4);
    while (before.ends_with(' ')) before.remove_suffix(1);
    const size_t colon = line.find(": ", at);
    if (!before.ends_with(':') || colon == std::string_view::npos) continue;
    before.remove_suffix(1);
    const size_t space = before.find_last_of(' ');
    const auto time = ParseSeconds(before.substr(space == std::string_view::npos ? 0 : space + 1));
    const std::string_view event = line.substr(at, colon - at);
    if (!time || event.find(' ') != std::string_view::npos) continue;
    std::string_view fields = line.substr(colon + 2);
    while (fields.starts_with(' ')) fields.remove_prefix(1);
    return EventLine{event, fields, *time};
  }
  return std::nullopt;
}

// What stands behind ` key=`, up to the next blank.
std::optional<std::string_view> FieldOf(std::string_view fields, std::string_view key) {
  const std::string wanted = fmt::format(" {}=", key);
  const size_t at = fields.find(wanted);
  if (at == std::string_view::npos) return std::nullopt;
  const std::string_view value = fields.substr(at + wanted.size());
  return value.substr(0, value.find(' '));
}

std::optional<uint64_t> NumberOf(std::string_view fields, std::string_view key, int base) {
  const auto text = FieldOf(fields, key);
  return text ? ParseNumber(*text, base) : std::nullopt;
}

// {0x1,0x2}
std::optional<std::vector<uint64_t>> ListOf(std::string_view fields, std::string_view key) {
  auto text = FieldOf(fields, key);
  if (!text || !text->starts_with('{') || !text->ends_with('}')) return std::nullopt;
  std::string_view rest = text->substr(1, text->size() - 2);
  std::vector<uint64_t> numbers;
  while (!rest.empty()) {
    const size_t comma = rest.find(',');
    const auto number = ParseNumber(rest.substr(0, comma), 10);
    if (!number) return std::nullopt;
    numbers.push_back(*number);
    rest = comma == std::string_view::npos ? std::string_view() : rest.substr(comma + 1);
  }
  return numbers;
}

class Importer {
 public:
  Importer(const std::string& name, DmaTextOptions options)
      : name_(name), options_(options), builder_(name) {}

  Result<DmaTrace> import(std::istream& lines) {
    std::string line(kMaxLine, '\0');
    while (lines.getline(line.data(), static_cast<std::streamsize>(line.size()))) {
      ++line_;
      MVGPU_RETURN_IF_ERROR(
          Take(std::string_view(line.data(), static_cast<size_t>(lines.gcount()))));
    }
    if (!lines.eof()) {
      ++line_;
      return Corrupt(fmt::format("longer than {} bytes, or not readable: no text", kMaxLine));
    }
    if (!first_ns_) {
      return Fail(ErrorCode::kCorrupt,
                  fmt::format("{}: no dma event in {} lines; it takes a session's trace, or what "
                              "ftrace prints of dma:dma_map_* and dma:dma_unmap_*",
                              name_, line_));
    }
    const uint64_t end = builder_.end_of_buffers();
    for (const IovaRange& range : PcMemory(options_.memory != 0 ? options_.memory : SizeFor(end))) {
      builder_.add_memory(range);
    }
    return std::move(builder_).build();
  }

 private:
  // How a driver finds its mapping again.
  struct Key {
    std::string device;
    uint64_t address = 0;
    auto operator<=>(const Key&) const = default;
  };
  struct Live {
    uint32_t buffer;
    uint64_t size;
  };

  // RAM whose last byte is in the GiB of `end`.
  static uint64_t SizeFor(uint64_t end) {
    const uint64_t rounded = std::max(kGiB, (end + kGiB - 1) / kGiB * kGiB);
    return rounded > 4 * kGiB ? rounded - kGiB : std::min(rounded, 3 * kGiB);
  }

  Result<void> Take(std::string_view text) {
    while (!text.empty() && (text.back() == '\0' || text.back() == '\r')) text.remove_suffix(1);
    if (text.starts_with('#')) return {};
    const auto line = FindEvent(text);
    if (!line) return {};
    if (!first_ns_) first_ns_ = line->time_ns;
    now_ns_ = std::max(now_ns_, line->time_ns - std::min(line->time_ns, *first_ns_));
    const std::string_view event = line->event;
    if (event == "dma_map_page" || event == "dma_map_phys") return TakeMap(*line);
    if (event == "dma_map_sg") return TakeMapList(*line);
    if (event == "dma_unmap_page" || event == "dma_unmap_phys") return TakeUnmap(*line);
    if (event == "dma_unmap_sg") return TakeUnmapList(*line);
    if (event == "dma_sync_single_for_cpu" || event == "dma_sync_single_for_device") {
      return TakeSync(*line);
    }
    builder_.skip();
    return {};
  }

  static std::string DeviceOf(std::string_view fields) {
    return std::string(fields.substr(0, fields.find(' ')));
  }
  // nullopt: none that moves data.
  static std::optional<dma::Direction> DirectionOf(std::string_view fields) {
    const auto text = FieldOf(fields, "dir");
    if (text == "TO_DEVICE") return dma::Direction::kToDevice;
    if (text == "FROM_DEVICE") return dma::Direction::kFromDevice;
    if (text == "BIDIRECTIONAL") return dma::Direction::kBidirectional;
    return std::nullopt;
  }
  static bool IsOfADevice(std::string_view fields) {
    const size_t attributes = fields.find(" attrs=");
    return attributes != std::string_view::npos &&
           fields.find("MMIO", attributes) != std::string_view::npos;
  }
  Result<void> Skip() {
    builder_.skip();
    return {};
  }

  Result<void> TakeMap(const EventLine& line) {
    const auto dma = NumberOf(line.fields, "dma_addr", 16);
    const auto phys = NumberOf(line.fields, "phys_addr", 16);
    const auto size = NumberOf(line.fields, "size", 10);
    if (!dma || !phys || !size) return Corrupt(line, "dma_addr, size or phys_addr");
    const auto direction = DirectionOf(line.fields);
    if (!direction || IsOfADevice(line.fields)) return Skip();
    const auto range = IovaRange::FromStartAndSize(Iova(*phys), *size);
    if (!range) return Corrupt(line, "a size that fits");
    return Map({DeviceOf(line.fields), *dma}, {&*range, 1}, *direction, &single_);
  }
  Result<void> TakeMapList(const EventLine& line) {
    const auto phys = ListOf(line.fields, "phys_addrs");
    const auto sizes = ListOf(line.fields, "sizes");
    if (!phys || !sizes) return Corrupt(line, "sizes or phys_addrs");
    const auto direction = DirectionOf(line.fields);
    // Where an IOMMU of the guest joined pieces there are fewer sizes than addresses.
    const bool is_whole = line.fields.find("[TRUNCATED]") == std::string_view::npos;
    if (!direction || !is_whole || phys->size() != sizes->size() || phys->empty()) return Skip();
    std::vector<IovaRange> ranges;
    for (size_t i = 0; i < phys->size(); ++i) {
      const auto range = IovaRange::FromStartAndSize(Iova((*phys)[i]), (*sizes)[i]);
      if (!range) return Corrupt(line, "sizes that fit");
      ranges.push_back(*range);
    }
    return Map({DeviceOf(line.fields), phys->front()}, ranges, *direction, &lists_);
  }
  using LiveTable = std::map<Key, Live>;
  Result<void> Map(Key key, std::span<const IovaRange> ranges, dma::Direction direction,
                   LiveTable* table) {
    MVGPU_RETURN_IF_ERROR(Unmap(key, table));  // its unmap was lost
    auto buffer = builder_.add_buffer(ranges, direction);
    if (!buffer) return Corrupt(buffer.error().message());
    MVGPU_RETURN_IF_ERROR(builder_.map(now_ns_, *buffer));
    table->insert_or_assign(std::move(key), Live{*buffer, ranges.front().size()});
    return builder_.access_all(now_ns_, *buffer);
  }
  Result<void> Unmap(const Key& key, LiveTable* table) {
    const auto found = table->find(key);
    if (found == table->end()) return {};
    const uint32_t buffer = found->second.buffer;
    table->erase(found);
    return builder_.unmap(now_ns_, buffer);
  }
  Result<void> TakeUnmap(const EventLine& line) {
    const auto dma = NumberOf(line.fields, "dma_addr", 16);
    if (!dma) return Corrupt(line, "dma_addr");
    const Key key{DeviceOf(line.fields), *dma};
    return single_.contains(key) ? Unmap(key, &single_) : Skip();
  }
  Result<void> TakeUnmapList(const EventLine& line) {
    const auto phys = ListOf(line.fields, "phys_addrs");
    if (!phys || phys->empty()) return Corrupt(line, "phys_addrs");
    const Key key{DeviceOf(line.fields), phys->front()};
    return lists_.contains(key) ? Unmap(key, &lists_) : Skip();
  }
  Result<void> TakeSync(const EventLine& line) {
    const auto dma = NumberOf(line.fields, "dma_addr", 16);
    if (!dma) return Corrupt(line, "dma_addr");
    // Maybe a part of it.
    auto found = single_.upper_bound({DeviceOf(line.fields), *dma});
    if (found == single_.begin()) return Skip();
    --found;
    if (found->first.device != DeviceOf(line.fields) ||
        *dma - found->first.address >= found->second.size) {
      return Skip();
    }
    return builder_.access_all(now_ns_, found->second.buffer);
  }

  tl::unexpected<Error> Corrupt(const EventLine& line, std::string_view what) const {
    return Corrupt(fmt::format("a {} event without {}", line.event, what));
  }
  tl::unexpected<Error> Corrupt(std::string_view what) const {
    return Fail(ErrorCode::kCorrupt, fmt::format("{}: line {}: {}", name_, line_, what));
  }

  const std::string name_;
  const DmaTextOptions options_;
  DmaTraceBuilder builder_;
  uint64_t line_ = 0;
  std::optional<uint64_t> first_ns_;
  uint64_t now_ns_ = 0;
  LiveTable single_;  // by DMA address
  LiveTable lists_;   // by the physical address of the first piece
};

}  // namespace

Result<DmaTrace> ImportDmaText(std::istream& lines, const std::string& name,
                               DmaTextOptions options) {
  return Importer(name, options).import(lines);
}

}  // namespace mvgpu::backend
