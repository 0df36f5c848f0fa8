#include "apionly-domain/viommu/recent_translations.h"

#include <gtest/gtest.h>

namespace mvgpu::domain {
namespace {

constexpr VtdRequest kRequest{
    .source = 0x3a91, .pasid = 0x12345, .address = 0x7f12'3456'7abc, .wanted = Access::kRead};
constexpr Leaf kLeaf{.out = 0x567'8abc,
                     .span = kPageSize,
                     .rights = kMayRead | kMayWrite,
                     .marked = kMayRead | kMayWrite};

class RecentTranslationsTest : public ::testing::Test {
 protected:
  bool Finds(const VtdRequest& request) { return recent_.find(request, &found_); }

  RecentTranslations recent_{16};
  RecentTranslations::Translation found_{};
};

TEST_F(RecentTranslationsTest, AnyAddressOfThePage) {
  EXPECT_FALSE(Finds(kRequest));
  recent_.remember(kRequest, kLeaf);
  VtdRequest request = kRequest;
  request.address = 0x7f12'3456'7fff;
  ASSERT_TRUE(Finds(request));
  EXPECT_EQ(found_.address, 0x567'8fff);
  EXPECT_EQ(found_.span, kPageSize);
  EXPECT_EQ(found_.rights, kLeaf.rights);
  request.address += 1;
  EXPECT_FALSE(Finds(request));
}

TEST_F(RecentTranslationsTest, OfALargePageTheParts) {
  VtdRequest request = kRequest;
  request.address = 0x40'1234;
  recent_.remember(
      request,
      {.out = 0x80'1234, .span = uint64_t{1} << 21, .rights = kMayRead, .marked = kMayRead});
  request.address = 0x40'1000;
  ASSERT_TRUE(Finds(request));
  EXPECT_EQ(found_.address, 0x80'1000);
  EXPECT_EQ(found_.span, uint64_t{1} << 21);
  request.address = 0x40'2000;
  EXPECT_FALSE(Finds(request));
}

TEST_F(RecentTranslationsTest, NobodyElses) {
  recent_.remember(kRequest, kLeaf);
  const auto differing = [](auto change) {
    VtdRequest request = kRequest;
    change(request);
    return request;
  };
  EXPECT_TRUE(Finds(kRequest));
  EXPECT_FALSE(Finds(differing([](VtdRequest& request) { request.source ^= 1; })));
  EXPECT_FALSE(Finds(differing([](VtdRequest& request) { request.pasid = 0x12344; })));
  EXPECT_FALSE(Finds(differing([](VtdRequest& request) { request.pasid.reset(); })));
  EXPECT_FALSE(Finds(differing([](VtdRequest& request) { request.wanted.privileged = true; })));
  EXPECT_FALSE(
      Finds(differing([](VtdRequest& request) { request.kind = VtdRequest::Kind::kTranslation; })));
  VtdRequest zero = kRequest;
  zero.pasid = 0;
  recent_.remember(zero, kLeaf);
  zero.pasid.reset();
  EXPECT_FALSE(Finds(zero)) << "PASID 0 is not none";
}

TEST_F(RecentTranslationsTest, OnlyAccesses) {
  for (const auto kind : {VtdRequest::Kind::kTranslation, VtdRequest::Kind::kPage}) {
    VtdRequest request = kRequest;
    request.kind = kind;
    recent_.remember(request, kLeaf);
    EXPECT_FALSE(Finds(request));
  }
}

// A wish for more has to leave marks in the tables.
TEST_F(RecentTranslationsTest, NoMoreThanIsMarked) {
  const auto wanting = [](Wanted wanted) {
    VtdRequest request = kRequest;
    request.wanted = wanted;
    return request;
  };
  Leaf clean = kLeaf;
  clean.marked = kMayRead;
  recent_.remember(kRequest, clean);
  EXPECT_TRUE(Finds(kRequest));
  EXPECT_FALSE(Finds(wanting(Access::kWrite)));
  EXPECT_FALSE(Finds(wanting(Access::kReadWrite)));
  EXPECT_FALSE(Finds(wanting({}))) << "who wants nothing";
  recent_.remember(kRequest, kLeaf);
  EXPECT_TRUE(Finds(wanting(Access::kWrite))) << "dirty already, whoever made it so";
  EXPECT_TRUE(Finds(wanting(Access::kReadWrite)));
  EXPECT_FALSE(Finds(wanting({})));
  recent_.remember(kRequest, clean);
  EXPECT_FALSE(Finds(wanting(Access::kWrite))) << "the last look at the tables counts";
}

TEST_F(RecentTranslationsTest, AllIsForgottenAtOnceAndForGood) {
  recent_.remember(kRequest, kLeaf);
  recent_.forget();
  EXPECT_FALSE(Finds(kRequest));
  // Until the count of it starts again, and beyond.
  for (uint64_t i = 0; i < (uint64_t{1} << 24) + 2; ++i) {
    recent_.forget();
    if (Finds(kRequest)) FAIL() << "after " << i << " more";
  }
  recent_.remember(kRequest, kLeaf);
  EXPECT_TRUE(Finds(kRequest));
}

TEST_F(RecentTranslationsTest, TheNewestIsAlwaysThere) {
  VtdRequest request = kRequest;
  for (uint64_t page = 0; page < 1000; ++page) {
    request.address = page << 12;
    request.pasid = page % 3;
    recent_.remember(request, {page << 13, kPageSize, kMayRead, kMayRead});
    ASSERT_TRUE(Finds(request));
    ASSERT_EQ(found_.address, page << 13);
  }
}

}  // namespace
}  // namespace mvgpu::domain
