#include "apionly-domain/nested/guest_tables.h"

#include "apionly-domain/api_only_domain.h"

namespace mvgpu::domain {

tl::expected<void, Fault> DomainTables::load(uint64_t address, std::span<uint64_t> words) const {
  if (domain_.load_words(Iova(address), words)) return {};
  return tl::unexpected(Fault{.code = FaultCode::kTableAccess});
}

tl::expected<uint64_t, Fault> DomainTables::compare_exchange(uint64_t address, uint64_t expected,
                                                             uint64_t desired) const {
  if (const auto found = domain_.compare_exchange(Iova(address), expected, desired)) return *found;
  return tl::unexpected(Fault{.code = FaultCode::kUpdateFailed});
}

}  // namespace mvgpu::domain
