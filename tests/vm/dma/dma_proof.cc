#include "tests/vm/dma/dma_proof.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace mvgpu::testing {

DmaProof::DmaProof(Facts* facts, std::unique_ptr<domain::PinBackend> pins, dma::Mapper* mapper,
                   EduDevice* edu)
    : facts_(*facts), edu_(*edu) {
  ram_.fill_pattern();
  domain_ =
      facts_.must("domain", domain::ApiOnlyDomain::Create({}, std::move(pins), nullptr, nullptr));
  facts_.must("attach", container_.attach(domain_.get()));
  map_low_half(0);
  map_low_half(1);
  for (uint64_t page = 0; page < kHighPages; ++page) {
    const uint64_t iova = kHigh + BytesIn(page);
    facts_.must("map high", container_.map(ram_.map_request(iova, OffsetOf(iova), kPageSize)));
  }
  cache_.emplace(domain_.get(), mapper);
  user_.emplace(&*cache_);
}

DmaProof::~DmaProof() {
  user_.reset();
  cache_.reset();
  facts_.must("unmap all", container_.unmap_all());
  facts_.check("nothing stays pinned",
               domain_->counters().unique_pages == 0 && domain_->counters().locked_pages == 0);
  facts_.must("detach", container_.detach(domain_.get()));
}

void DmaProof::map_low_half(uint64_t half) {
  const uint64_t iova = kLow + half * kLowHalf;
  facts_.must("map low", container_.map(ram_.map_request(iova, OffsetOf(iova), kLowHalf)));
}

uint64_t DmaProof::OffsetOf(uint64_t iova) {
  if (iova < kHigh) return iova - kLow;
  const uint64_t page = PagesIn(iova - kHigh);
  return BytesIn(60 - 2 * page) + (iova & kPageMask);
}

std::vector<std::byte> DmaProof::bytes_at(uint64_t iova, uint64_t size) {
  std::vector<std::byte> bytes(size);
  for (uint64_t i = 0; i < size; ++i) bytes[i] = *byte_at(iova + i);
  return bytes;
}

void DmaProof::fill(uint64_t iova, uint64_t size, unsigned seed) {
  for (uint64_t i = 0; i < size; ++i) *byte_at(iova + i) = static_cast<std::byte>(seed + i * 29);
}

std::vector<std::byte> DmaProof::all_bytes() { return {ram_.bytes().begin(), ram_.bytes().end()}; }

bool DmaProof::is_unchanged(const std::vector<std::byte>& before, std::optional<uint64_t> except) {
  const std::span<std::byte> now = ram_.bytes();
  const auto differs = [&](size_t from, size_t to) {
    return std::memcmp(now.data() + from, before.data() + from, to - from) != 0;
  };
  const size_t page = except ? OffsetOf(*except & ~kPageMask) : 0;
  const size_t behind = except ? page + kPageSize : 0;
  return !differs(0, page) && !differs(behind, now.size());
}

DeviceUse DmaProof::use(uint64_t iova, uint64_t size) {
  return facts_.must("cache", try_use(iova, size));
}

// The only place that asks the cache.
Result<DeviceUse> DmaProof::try_use(uint64_t iova, uint64_t size) {
  MVGPU_ASSIGN_OR_RETURN(dma::DmaMapping mapping,
                         (*user_)->map(MakeRange(iova, size), dma::Direction::kBidirectional));
  return DeviceUse{std::move(mapping)};
}

void DmaProof::take_away(const DeviceUse& use, uint64_t iova, uint64_t size,
                         std::string_view what) {
  const auto check = [&](std::string_view fact, bool is_true) {
    facts_.check(fmt::format("{}: {}", what, fact), is_true);
  };
  user_->told.clear();
  check("before, the mapping is valid", use.mapping.is_valid());
  const uint64_t gone =
      facts_.must(fmt::format("{}: unmap", what), container_.unmap(Iova(iova), size));
  check("all of it was unmapped", gone == size);
  check("the user was told, once", user_->told == std::vector{MakeRange(iova, size)});
  check("the mapping is not valid any more", !use.mapping.is_valid());
  std::byte byte;
  const auto read = use.mapping.read(Iova(iova), {&byte, 1});
  check("nothing is read through it", !read && read.error().code() == ErrorCode::kRevoked);
  const auto refused = try_use(iova, size);
  check("a new use says that nothing is mapped",
        !refused && refused.error().code() == ErrorCode::kNotMapped);
}

void DmaProof::check_copies() {
  const DeviceUse low = use(kLow, 2 * kLowHalf);
  const DeviceUse high = use(kHigh, kHighPages * kPageSize);
  CheckCopy(low, high, kLow + 3 * kPageSize, kHigh + 5 * kPageSize, kPageSize);
  CheckCopy(high, low, kHigh + 2 * kPageSize, kLow + 31 * kPageSize, kPageSize);
  CheckCopy(low, low, kLow + 0x10, kLow + 17 * kPageSize + 0x7f8, 512);
  CheckCopy(high, high, kHigh + 7 * kPageSize + 0xff0, kHigh + 1, 16);
  CheckCopy(low, high, kLow + 8 * kPageSize + 0xfff, kHigh + kPageSize + 0xfff, 1);
}

// From one place through the device's buffer to another; what lies around must stay.
void DmaProof::CheckCopy(const DeviceUse& from, const DeviceUse& to, uint64_t from_iova,
                         uint64_t to_iova, uint64_t size) {
  fill(from_iova, size, static_cast<unsigned>(from_iova >> 12) + 1);
  const auto sent = bytes_at(from_iova, size);
  const uint64_t page = to_iova & ~kPageMask;
  auto wanted = bytes_at(page, kPageSize);
  std::copy(sent.begin(), sent.end(), wanted.begin() + static_cast<ptrdiff_t>(to_iova - page));
  facts_.must("load", edu_.load(from.at(from_iova), size));
  facts_.must("store", edu_.store(to.at(to_iova), size));
  facts_.check(fmt::format("{} bytes from iova {:#x} (device {:#x}) to {:#x} (device {:#x})", size,
                           from_iova, from.at(from_iova).value(), to_iova, to.at(to_iova).value()),
               bytes_at(page, kPageSize) == wanted && bytes_at(from_iova, size) == sent);
}

void DmaProof::check_crossing(const DeviceUse& use) {
  const uint64_t from = kHigh + 2 * kPageSize - 256;
  const uint64_t to = kLow + 6 * kPageSize;
  fill(from, 512, 77);
  const auto sent = bytes_at(from, 512);
  const DeviceUse target = this->use(to, kPageSize);
  facts_.must("load", edu_.load(use.at(from), 512));
  facts_.must("store", edu_.store(target.at(to), 512));
  facts_.check("one load crosses scattered pages", bytes_at(to, 512) == sent);
}

}  // namespace mvgpu::testing
