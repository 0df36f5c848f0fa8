#include "apionly-domain/api_only_domain.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace mvgpu::domain {

Result<std::unique_ptr<ApiOnlyDomain>> ApiOnlyDomain::Create(Options options,
                                                             std::unique_ptr<PinBackend> backend,
                                                             Ledger* ledger,
                                                             AccessObserver* observer) {
  std::unique_ptr<ApiOnlyDomain> domain(
      new ApiOnlyDomain(std::move(options), std::move(backend), observer));
  if (ledger != nullptr) {
    MVGPU_ASSIGN_OR_RETURN(
        domain->ledger_row_,
        ledger->join(DomainKind::kApiOnly, domain->options_.name, domain->backend_name_));
  }
  if (DevicePins* const device_pins = domain->options_.device_pins; device_pins != nullptr) {
    device_pins->join(domain.get());
  }
  return domain;
}

ApiOnlyDomain::ApiOnlyDomain(Options options, std::unique_ptr<PinBackend> backend,
                             AccessObserver* observer)
    : options_(std::move(options)),
      observer_(observer),
      backend_name_(backend->name()),
      backend_(std::move(backend)),
      files_(/*indexed=*/options_.device_pins != nullptr) {}

ApiOnlyDomain::~ApiOnlyDomain() {
  if (options_.device_pins != nullptr) options_.device_pins->leave(this);
  MutexLock lock(pin_mutex_);
  MVGPU_CHECK(contexts_.empty());
  MVGPU_CHECK(counters_.mapped_pages == 0 && counters_.unique_pages == 0);
}

std::unique_ptr<PinContext> ApiOnlyDomain::open_context(PinOwner* owner) {
  std::unique_ptr<PinContext> context(new PinContext(this, owner));
  MutexLock lock(pin_mutex_);
  contexts_.push_back(context.get());
  return context;
}

void ApiOnlyDomain::CloseContext(PinContext* context) {
  MutexLock lock(pin_mutex_);
  std::erase(contexts_, context);
  SpinLockHold hold(context->lock_);
  counters_.pin_calls += context->figures_.pin_calls;
  counters_.pages_pinned += context->figures_.pages_pinned;
}

ApiOnlyDomain::Counters ApiOnlyDomain::counters() const {
  MutexLock lock(pin_mutex_);
  Counters counters = counters_;
  counters.locked_pages = backend_->locked_pages();
  for (PinContext* context : contexts_) {
    SpinLockHold hold(context->lock_);
    counters.pin_calls += context->figures_.pin_calls;
    counters.pages_pinned += context->figures_.pages_pinned;
    counters.pinned_pages += context->figures_.pinned_pages;
  }
  if (ledger_row_ != nullptr) counters.charged_pages = ledger_row_->counts().charged_pages;
  return counters;
}

uint64_t ApiOnlyDomain::PinnedPagesLocked() const {
  uint64_t pages = 0;
  for (PinContext* context : contexts_) {
    SpinLockHold hold(context->lock_);
    pages += context->figures_.pinned_pages;
  }
  return pages;
}

// Hits do not come by here, so the ledger's figure of pinned pages is from the last miss.
void ApiOnlyDomain::PublishCountsLocked() {
  ledger_row_->set_mapped_pages(counters_.mapped_pages);
  ledger_row_->set_pinned_pages(PinnedPagesLocked());
  ledger_row_->set_locked_pages(backend_->locked_pages());
  ledger_row_->set_locked_areas(backend_->areas(), backend_->area_budget());
}

void ApiOnlyDomain::show_locked() const {
  if (ledger_row_ == nullptr) return;
  MutexLock lock(pin_mutex_);
  ledger_row_->set_locked_pages(backend_->locked_pages());
}

FilePages ApiOnlyDomain::backing_of(const PinnedRun& run) const {
  MutexLock lock(pin_mutex_);
  return files_.at(run.host, PagesOf(run.iova).count);
}

Result<void> ApiOnlyDomain::on_map(const Mapping& mapping) {
  if (mapping.file == nullptr) return {};
  {
    MutexLock lock(pin_mutex_);
    files_.add(mapping);
    counters_.mapped_pages += mapping.pages();
    if (ledger_row_ != nullptr) ledger_row_->set_mapped_pages(counters_.mapped_pages);
  }
  directory_.map(mapping.iova, mapping.file->host_address(mapping.file_offset),
                 static_cast<uint64_t>(mapping.access) | PageDirectory::kGoing);
  return {};
}

void ApiOnlyDomain::on_map_done(const Mapping& mapping, bool mapped) {
  if (!mapped) {
    if (mapping.file != nullptr) on_unmap_done({mapping.iova, {&mapping, 1}}, /*unmapped=*/true);
  } else if (mapping.file != nullptr) {
    directory_.set_going(mapping.iova, false);
    if (ledger_row_ != nullptr) {
      ledger_row_->list_mapping(
          {mapping.iova, mapping.access, mapping.file->identity(), mapping.file_offset});
    }
  } else {
    MutexLock lock(fileless_mutex_);
    fileless_.emplace(mapping.iova.start().value(), mapping);
  }
}

std::vector<ApiOnlyDomain::Holder> ApiOnlyDomain::holders(IovaRange range) const {
  std::vector<Holder> found;
  MutexLock lock(pin_mutex_);
  for (PinContext* context : contexts_) {
    std::vector<PageRun> held;
    {
      SpinLockHold hold(context->lock_);
      for (const PinCounts& counts : context->counts_) counts.append_held(PagesOf(range), &held);
    }
    if (held.empty()) continue;
    RunCounter distinct;
    for (const PageRun& run : held) distinct.add(run);
    const auto first =
        std::min_element(held.begin(), held.end(),
                         [](const PageRun& a, const PageRun& b) { return a.first < b.first; });
    found.push_back({std::string(context->owner_->pin_owner_name()), distinct.unique_pages(),
                     Iova(BytesIn(first->first))});
  }
  return found;
}

void ApiOnlyDomain::start_dirty_log() {
  // With the pin lock: a release that saw the log off has ended, and what its device wrote is there
  // for whoever copies all memory next.
  MutexLock lock(pin_mutex_);
  dirty_.start();
}

void ApiOnlyDomain::stop_dirty_log() { dirty_.stop(); }

Result<void> ApiOnlyDomain::read_dirty(IovaRange range, uint64_t bit_size, DirtyLog::Read read,
                                       std::span<uint64_t> bitmap) {
  MVGPU_RETURN_IF_ERROR(DirtyLog::CheckBitmap(range, bit_size, bitmap));
  if (!dirty_.is_on()) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("{}: dirty pages are not logged; start the log first", options_.name));
  }
  MutexLock lock(pin_mutex_);  // no page goes from held to marked in between
  dirty_.read(range, bit_size, read, bitmap);
  for (PinContext* context : contexts_) {
    std::vector<PageRun> held;
    {
      SpinLockHold hold(context->lock_);
      context->CountsLocked(/*for_write=*/true).append_held(PagesOf(range), &held);
    }
    for (const PageRun& run : held) DirtyLog::SetBits(range, bit_size, run, bitmap);
  }
  return {};
}

}  // namespace mvgpu::domain
