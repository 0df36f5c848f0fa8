#include "backend/trace/byte_codec.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <initializer_list>

#include "tests/backend/raw_trace.h"

namespace mvgpu::backend {
namespace {

testing::RawBytes BytesOf(std::initializer_list<int> values) {
  testing::RawBytes bytes;
  for (const int value : values) bytes.push_back(static_cast<std::byte>(value));
  return bytes;
}
testing::RawBytes WrittenVarint(uint64_t value) {
  ByteWriter writer;
  writer.varint(value);
  return {writer.view().begin(), writer.view().end()};
}
std::optional<uint64_t> ReadVarint(const testing::RawBytes& bytes) {
  return ByteReader(bytes).varint();
}

constexpr auto kEdges = std::to_array<uint64_t>(
    {0, 1, 127, 128, 16383, 16384, uint64_t{1} << 32, (uint64_t{1} << 56) - 1, uint64_t{1} << 56,
     (uint64_t{1} << 63) - 1, uint64_t{1} << 63, UINT64_MAX - 1, UINT64_MAX});

TEST(ByteCodec, VarintsAreLeb128) {
  EXPECT_EQ(WrittenVarint(0), BytesOf({0}));
  EXPECT_EQ(WrittenVarint(127), BytesOf({127}));
  EXPECT_EQ(WrittenVarint(128), BytesOf({0x80, 1}));
  EXPECT_EQ(WrittenVarint(300), BytesOf({0xac, 2}));
  EXPECT_EQ(WrittenVarint(UINT64_MAX).size(), 10u);
}

TEST(ByteCodec, EveryVarintComesBack) {
  for (const uint64_t value : kEdges) {
    EXPECT_EQ(ReadVarint(WrittenVarint(value)), value);
    testing::RawBytes own;
    testing::AppendVarint(own, value);
    EXPECT_EQ(WrittenVarint(value), own) << "as somebody else would write it";
  }
}

TEST(ByteCodec, VarintThatEndsTooEarlyIsNone) {
  for (const uint64_t value : kEdges) {
    testing::RawBytes bytes = WrittenVarint(value);
    bytes.pop_back();
    EXPECT_EQ(ReadVarint(bytes), std::nullopt) << value;
  }
}

TEST(ByteCodec, VarintOfMoreThan64BitsIsNone) {
  testing::RawBytes bytes = WrittenVarint(UINT64_MAX);
  EXPECT_EQ(ReadVarint(bytes), UINT64_MAX);
  bytes.back() = std::byte{2};
  EXPECT_EQ(ReadVarint(bytes), std::nullopt) << "bit 64";
  bytes.back() = std::byte{0x81};
  bytes.push_back(std::byte{0});
  EXPECT_EQ(ReadVarint(bytes), std::nullopt) << "eleven bytes";
}

TEST(ByteCodec, FixedWordsAreLittleEndian) {
  ByteWriter writer;
  writer.fixed64(0x0102030405060708);
  EXPECT_TRUE(std::ranges::equal(writer.view(), BytesOf({8, 7, 6, 5, 4, 3, 2, 1})));
  EXPECT_EQ(ByteReader(writer.view()).fixed64(), 0x0102030405060708u);
  EXPECT_EQ(ByteReader(writer.view().first(7)).fixed64(), std::nullopt);
}

TEST(ByteCodec, FieldsOfAllKindsFollowEachOther) {
  ByteWriter writer;
  writer.varint(300);
  writer.fixed64(UINT64_MAX);
  writer.varint(7);
  writer.text("rest");
  ByteReader reader(writer.view());
  EXPECT_EQ(reader.varint(), 300u);
  EXPECT_EQ(reader.fixed64(), UINT64_MAX);
  EXPECT_EQ(reader.varint(), 7u);
  EXPECT_EQ(reader.position(), 11u);
  EXPECT_EQ(reader.rest_as_text(), "rest");
  writer.clear();
  EXPECT_TRUE(writer.view().empty());
}

}  // namespace
}  // namespace mvgpu::backend
