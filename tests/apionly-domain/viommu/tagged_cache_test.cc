#include "apionly-domain/viommu/tagged_cache.h"

#include <gtest/gtest.h>

#include <map>

namespace mvgpu::domain {
namespace {

using Cache = TaggedCache<uint32_t, uint64_t>;

TEST(TaggedCacheTest, HoldsAtMostItsSize) {
  Cache cache(30);
  EXPECT_EQ(cache.capacity(), 32);
  for (uint32_t key = 0; key < 1000; ++key) {
    cache.insert(key, key * 3);
    ASSERT_NE(cache.find(key), nullptr) << "the newest is there";
    ASSERT_EQ(*cache.find(key), key * 3);
    ASSERT_LE(cache.size(), cache.capacity());
  }
  uint32_t found = 0;
  for (uint32_t key = 0; key < 1000; ++key) {
    if (const uint64_t* value = cache.find(key)) {
      EXPECT_EQ(*value, key * 3);
      ++found;
    }
  }
  EXPECT_EQ(found, cache.size());
  EXPECT_EQ(found, 32) << "1000 keys fill each of 8 sets";
}

TEST(TaggedCacheTest, ANewOneTakesThePlaceOfTheOldest) {
  TaggedCache<uint32_t, int> cache(4);  // one set
  for (uint32_t key = 0; key < 4; ++key) cache.insert(key, 0);
  cache.insert(10, 1);
  EXPECT_EQ(cache.find(0), nullptr);
  cache.insert(11, 1);
  EXPECT_EQ(cache.find(1), nullptr);
  for (const uint32_t key : {2u, 3u, 10u, 11u}) EXPECT_NE(cache.find(key), nullptr) << key;
}

TEST(TaggedCacheTest, AnotherValueForAKeyReplacesTheOldOne) {
  Cache cache(4);
  cache.insert(7, 1);
  cache.insert(7, 2);
  EXPECT_EQ(cache.size(), 1);
  EXPECT_EQ(*cache.find(7), 2);
}

TEST(TaggedCacheTest, ErasesWhatMatches) {
  Cache cache(64);
  for (uint32_t key = 0; key < 8; ++key) cache.insert(key, key % 2);
  cache.erase_if([](uint32_t, uint64_t value) { return value == 1; });
  EXPECT_EQ(cache.size(), 4);
  for (uint32_t key = 0; key < 8; ++key) EXPECT_EQ(cache.find(key) != nullptr, key % 2 == 0);
  cache.clear();
  EXPECT_EQ(cache.size(), 0);
  EXPECT_EQ(cache.find(0), nullptr);
}

// With a hole among the ways, a key that stands behind it is still replaced and not doubled.
TEST(TaggedCacheTest, AKeyIsThereOnceAlsoAfterErasing) {
  Cache cache(4);
  for (uint32_t key = 0; key < 4; ++key) cache.insert(key, 1);
  cache.erase_if([](uint32_t key, uint64_t) { return key == 0; });
  cache.insert(3, 2);
  EXPECT_EQ(cache.size(), 3);
  cache.erase_if([](uint32_t, uint64_t value) { return value == 2; });
  EXPECT_EQ(cache.find(3), nullptr);
}

}  // namespace
}  // namespace mvgpu::domain
