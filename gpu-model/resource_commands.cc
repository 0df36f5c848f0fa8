// Commands of GpuDevice2d about resources and their pages (virtio 1.2, 5.7.6.8).

#include <utility>
#include <vector>

#include "gpu-model/gpu_device_2d.h"

namespace mvgpu::gpu {

using wire::Response;

Response GpuDevice2d::Refuse(const Error& error) {
  owner_->on_refused(error);
  return ResponseOf(error);
}

Resource* GpuDevice2d::FindResource(uint32_t id) const {
  const auto it = resources_.find(id);
  return it == resources_.end() ? nullptr : it->second.get();
}

Resource* GpuDevice2d::FindBackedResource(uint32_t id, Response* error) const {
  Resource* resource = FindResource(id);
  if (resource == nullptr) {
    *error = Response::kErrInvalidResourceId;
  } else if (!resource->has_backing()) {
    *error = Response::kErrUnspec;
    return nullptr;
  }
  return resource;
}

Response GpuDevice2d::ResourceCreate2d(Request request) {
  const auto command = wire::ReadAt<wire::ResourceCreate2d>(request);
  if (!command) return Response::kErrInvalidParameter;
  if (command->resource_id == 0 || FindResource(command->resource_id) != nullptr) {
    return Response::kErrInvalidResourceId;
  }
  const auto format = FormatFromWire(command->format);
  if (!format) return Response::kErrInvalidParameter;
  const auto is_valid = [](uint32_t n) { return n != 0 && n <= Resource::kMaxDimension; };
  if (!is_valid(command->width) || !is_valid(command->height)) {
    return Response::kErrInvalidParameter;
  }
  if (resources_.size() >= config_.max_resources) return Response::kErrOutOfMemory;
  auto resource = Resource::Create(*format, {command->width, command->height}, &budget_);
  if (!resource) return Refuse(resource.error());
  resources_.emplace(command->resource_id, std::move(*resource));
  return Response::kOkNodata;
}

Response GpuDevice2d::ResourceUnref(Request request) {
  const auto command = wire::ReadAt<wire::ResourceCommand>(request);
  if (!command) return Response::kErrInvalidParameter;
  if (FindResource(command->resource_id) == nullptr) return Response::kErrInvalidResourceId;
  DestroyResource(command->resource_id);
  return Response::kOkNodata;
}

void GpuDevice2d::DestroyResource(uint32_t id) {
  const auto it = resources_.find(id);
  for (uint32_t i = 0; i < config_.scanouts; ++i) {
    if (heads_[i].scanout.shows(*it->second)) DisableScanout(i);
  }
  resources_.erase(it);
}

Result<Response> GpuDevice2d::ResourceAttachBacking(Request request) {
  const auto command = wire::ReadAt<wire::ResourceAttachBacking>(request);
  if (!command) return Response::kErrInvalidParameter;
  Resource* resource = FindResource(command->resource_id);
  if (resource == nullptr) return Response::kErrInvalidResourceId;
  if (resource->has_backing() || command->nr_entries > config_.max_backing_entries) {
    return Response::kErrUnspec;
  }
  // The list must be there in full; the limit above keeps the product far from overflow.
  const Request list = request.subspan(sizeof(*command));
  if (list.size() / sizeof(wire::MemEntry) < command->nr_entries) return Response::kErrUnspec;
  if (command->nr_entries == 0) return Response::kOkNodata;  // nothing to attach, as in QEMU

  std::vector<BackingEntry> entries(command->nr_entries);
  for (size_t i = 0; i < entries.size(); ++i) {
    const auto entry = wire::ReadAt<wire::MemEntry>(list, i * sizeof(wire::MemEntry));
    entries[i] = {Iova(entry->addr), entry->length};
  }
  auto backing = Backing::Create(entries, {user_.get(), domain_, space_, &translated_});
  if (!backing) {
    if (backing.error().code() == ErrorCode::kPending) {
      return tl::unexpected<Error>(std::move(backing).error());
    }
    return Refuse(backing.error());
  }
  resource->attach(std::move(*backing));
  return Response::kOkNodata;
}

Response GpuDevice2d::ResourceDetachBacking(Request request) {
  const auto command = wire::ReadAt<wire::ResourceCommand>(request);
  if (!command) return Response::kErrInvalidParameter;
  Response error{};
  Resource* resource = FindBackedResource(command->resource_id, &error);
  if (resource == nullptr) return error;
  resource->detach();
  return Response::kOkNodata;
}

Result<Response> GpuDevice2d::TransferToHost2d(Request request) {
  const auto command = wire::ReadAt<wire::TransferToHost2d>(request);
  if (!command) return Response::kErrInvalidParameter;
  Response error{};
  Resource* resource = FindBackedResource(command->resource_id, &error);
  if (resource == nullptr) return error;
  const wire::Rectangle& rect = command->rect;
  if (!IsInside(rect, resource->size())) return Response::kErrInvalidParameter;
  if (rect.width == 0 || rect.height == 0) return Response::kOkNodata;

  const auto copied =
      resource->transfer({rect.x, rect.y, rect.width, rect.height}, command->offset);
  if (!copied) {
    const ErrorCode code = copied.error().code();
    if (code == ErrorCode::kPending) return tl::unexpected<Error>(copied.error());
    return code == ErrorCode::kInvalid ? Response::kErrInvalidParameter : Refuse(copied.error());
  }
  counters_.transferred_bytes += *copied;
  return Response::kOkNodata;
}

}  // namespace mvgpu::gpu
