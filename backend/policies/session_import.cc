#include "backend/policies/session_import.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <absl/container/btree_map.h>

#include "backend/trace/byte_codec.h"
#include "gpu-model/protocol.h"
#include "vmm-glue/virtio/virtio_gpu.h"

namespace mvgpu::backend {

namespace {

namespace wire = gpu::wire;

constexpr uint64_t kBytesPerPixel = 4;  // of every format that virtio-gpu has
constexpr uint64_t kMaxResources = 1 << 20;

class Importer {
 public:
  explicit Importer(TraceReader* reader) : reader_(*reader), builder_(reader->name()) {}

  Result<DmaTrace> import() {
    while (true) {
      MVGPU_ASSIGN_OR_RETURN(const auto record, reader_.next());
      if (!record) break;
      now_ns_ = record->time_ns;
      MVGPU_RETURN_IF_ERROR(Take(*record));
    }
    return std::move(builder_).build();
  }

 private:
  struct Resource {
    uint64_t width = 0;
    uint64_t height = 0;
    std::optional<uint32_t> buffer{};  // mapped
    std::vector<IovaRange> backing{};  // the parts of the buffer
  };

  Result<void> Take(const TraceRecord& record) {
    ByteReader payload(record.payload);
    switch (record.type) {
      case TraceType::kMap:
        return TakeMap(payload);
      case TraceType::kReset:
        return UnmapAll();
      case TraceType::kRequest:
        request_.clear();
        if (payload.varint() == glue::VirtioGpu::kControlQueue) {
          const auto bytes = payload.rest();
          request_.assign(bytes.begin(), bytes.end());
        }
        return {};
      case TraceType::kResponse:
        return TakeResponse(payload);
      default:
        return {};
    }
  }

  Result<void> TakeMap(ByteReader& payload) {
    std::array<uint64_t, 4> field{};  // iova, size, access, file
    for (uint64_t& value : field) {
      const auto number = payload.varint();
      if (!number) return Corrupt("a map record is too short");
      value = *number;
    }
    const auto range = IovaRange::FromStartAndSize(Iova(field[0]), field[1]);
    if (!range) return Corrupt("a map record without memory");
    if (field[3] == 0) return {};
    if (memory_.size() >= kMaxResources) return Corrupt("too many mappings");
    memory_.push_back(*range);
    builder_.add_memory(*range);
    return {};
  }

  // What the request asked for has happened.
  Result<void> TakeResponse(ByteReader& payload) {
    if (payload.varint() != glue::VirtioGpu::kControlQueue) return {};
    const std::vector<std::byte> request = std::exchange(request_, {});
    const auto header = wire::ReadAt<wire::Header>(request, 0);
    const auto answer = wire::ReadAt<wire::Header>(payload.rest(), 0);
    if (!header || !answer || answer->type != static_cast<uint32_t>(wire::Response::kOkNodata)) {
      return {};
    }
    switch (static_cast<wire::Command>(header->type)) {
      case wire::Command::kResourceCreate2d:
        return Create(request);
      case wire::Command::kResourceAttachBacking:
        return Attach(request);
      case wire::Command::kTransferToHost2d:
        return Transfer(request);
      case wire::Command::kResourceDetachBacking:
      case wire::Command::kResourceUnref:
        return Detach(request, static_cast<wire::Command>(header->type));
      default:
        return {};
    }
  }

  Result<void> Create(std::span<const std::byte> request) {
    const auto command = wire::ReadAt<wire::ResourceCreate2d>(request, 0);
    if (!command || resources_.size() >= kMaxResources) return Corrupt("a bad RESOURCE_CREATE_2D");
    // The device refuses an id that it has: it was reset in between, by a register.
    if (resources_.contains(command->resource_id)) MVGPU_RETURN_IF_ERROR(UnmapAll());
    resources_.emplace(command->resource_id, Resource{command->width, command->height});
    return {};
  }

  Result<void> Attach(std::span<const std::byte> request) {
    const auto command = wire::ReadAt<wire::ResourceAttachBacking>(request, 0);
    const auto found = command ? resources_.find(command->resource_id) : resources_.end();
    if (found == resources_.end() || found->second.buffer) return Corrupt("a bad ATTACH_BACKING");
    std::vector<IovaRange> backing;
    for (uint64_t i = 0; i < command->nr_entries; ++i) {
      const auto entry = wire::ReadAt<wire::MemEntry>(
          request, sizeof(wire::ResourceAttachBacking) + i * sizeof(wire::MemEntry));
      if (!entry) return Corrupt("an ATTACH_BACKING without all of its entries");
      const auto range = IovaRange::FromStartAndSize(Iova(entry->addr), entry->length);
      if (range && IsMemory(range->page_expanded())) {
        backing.push_back(*range);
      } else if (entry->length != 0) {
        builder_.skip();
        return {};
      }
    }
    if (backing.empty()) return {};
    MVGPU_ASSIGN_OR_RETURN(const uint32_t buffer,
                           builder_.add_buffer(backing, dma::Direction::kToDevice));
    found->second.buffer = buffer;
    found->second.backing = std::move(backing);
    return builder_.map(now_ns_, buffer);
  }
  bool IsMemory(IovaRange range) const {
    return std::any_of(memory_.begin(), memory_.end(),
                       [&](const IovaRange& memory) { return memory.contains(range); });
  }

  Result<void> Transfer(std::span<const std::byte> request) {
    const auto command = wire::ReadAt<wire::TransferToHost2d>(request, 0);
    const auto found = command ? resources_.find(command->resource_id) : resources_.end();
    if (found == resources_.end()) return Corrupt("a bad TRANSFER_TO_HOST_2D");
    const Resource& resource = found->second;
    const uint64_t width = command->rect.width;
    const uint64_t height = command->rect.height;
    if (!resource.buffer || width == 0 || height == 0) {
      builder_.skip();
      return {};
    }
    // 5.7.6.8: lines are as far apart as the resource is wide.
    const uint64_t size = (height - 1) * resource.width * kBytesPerPixel + width * kBytesPerPixel;
    const auto last = CheckedAdd(command->offset, size - 1);
    const auto first_page = PageAt(resource, command->offset);
    const auto last_page = last ? PageAt(resource, *last) : std::nullopt;
    if (!first_page || !last_page) return Corrupt("a transfer from beyond its backing");
    return builder_.access(now_ns_, *resource.buffer, *first_page, *last_page - *first_page + 1);
  }
  // Which page of the buffer has a byte of the backing.
  static std::optional<uint64_t> PageAt(const Resource& resource, uint64_t offset) {
    uint64_t pages = 0;
    for (const IovaRange& range : resource.backing) {
      if (offset < range.size()) {
        return pages + (range.start() + offset).page() - range.start().page();
      }
      offset -= range.size();
      pages += PagesOf(range).count;
    }
    return std::nullopt;
  }

  Result<void> Detach(std::span<const std::byte> request, wire::Command kind) {
    const auto command = wire::ReadAt<wire::ResourceCommand>(request, 0);
    const auto found = command ? resources_.find(command->resource_id) : resources_.end();
    if (found == resources_.end()) return Corrupt("a resource goes that is not there");
    auto done = Unmap(&found->second);
    if (kind == wire::Command::kResourceUnref) resources_.erase(found);
    return done;
  }
  Result<void> Unmap(Resource* resource) {
    if (!resource->buffer) return {};
    resource->backing.clear();
    return builder_.unmap(now_ns_, *std::exchange(resource->buffer, std::nullopt));
  }
  Result<void> UnmapAll() {
    for (auto& [id, resource] : resources_) MVGPU_RETURN_IF_ERROR(Unmap(&resource));
    resources_.clear();
    return {};
  }
  tl::unexpected<Error> Corrupt(std::string_view what) const {
    return Fail(ErrorCode::kCorrupt, fmt::format("{}: {}", reader_.name(), what));
  }

  TraceReader& reader_;  // outlives this, see ImportSession()
  DmaTraceBuilder builder_;
  std::vector<IovaRange> memory_;  // with a file behind
  uint64_t now_ns_ = 0;
  std::vector<std::byte> request_;  // that is not answered yet
  absl::btree_map<uint32_t, Resource> resources_;
};

}  // namespace

Result<DmaTrace> ImportSession(TraceReader* reader) { return Importer(reader).import(); }

}  // namespace mvgpu::backend
