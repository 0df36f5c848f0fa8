#include "apionly-domain/memory/guest_file.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <vector>

#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::FailsWith;
using testing::GuestRam;
using testing::IsOk;

std::unique_ptr<GuestFile> Open(const GuestRam& ram) {
  auto file = GuestFile::Create(ram.duplicate());
  EXPECT_THAT(file, IsOk());
  return std::move(*file);
}

TEST(GuestFile, ReadsAndWritesGuestBytes) {
  GuestRam ram(4 * kPageSize);
  ram.fill_pattern();
  auto file = Open(ram);
  std::vector<std::byte> copy(5000);
  ASSERT_THAT(file->read(3000, copy), IsOk());
  EXPECT_EQ(std::memcmp(copy.data(), ram.at(3000), copy.size()), 0);

  const std::array<std::byte, 3> news = {std::byte{1}, std::byte{2}, std::byte{3}};
  ASSERT_THAT(file->write(4095, news), IsOk());
  EXPECT_EQ(*ram.at(4097), std::byte{3});
}

TEST(GuestFile, RefusesAccessBeyondItsEnd) {
  GuestRam ram(kPageSize);
  auto file = Open(ram);
  std::vector<std::byte> copy(2);
  EXPECT_THAT(file->read(kPageSize - 2, copy), IsOk());
  EXPECT_THAT(file->read(kPageSize - 1, copy), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(file->read(UINT64_MAX, copy), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(file->write(kPageSize, copy), FailsWith(ErrorCode::kInvalid));
}

TEST(GuestFile, ATruncationIsAnErrorNotACrash) {
  GuestRam ram(4 * kPageSize, /*seals=*/0);
  auto file = Open(ram);
  EXPECT_FALSE(file->is_sealed_against_shrinking());
  std::vector<std::byte> copy(16);
  ASSERT_THAT(file->read(3 * kPageSize, copy), IsOk());
  ASSERT_EQ(ftruncate(ram.fd(), kPageSize), 0);
  for (int i = 0; i < 3; ++i) {  // more than once: the signal must not stay blocked
    EXPECT_THAT(file->read(3 * kPageSize, copy), FailsWith(ErrorCode::kTruncated));
    EXPECT_THAT(file->write(2 * kPageSize, copy), FailsWith(ErrorCode::kTruncated));
  }
  EXPECT_THAT(file->read(0, copy), IsOk());
}

TEST(GuestFile, SealsAreSeen) {
  GuestRam ram(kPageSize, F_SEAL_SHRINK);
  EXPECT_TRUE(Open(ram)->is_sealed_against_shrinking());
}

TEST(GuestFile, OnlyRegularFilesAreGuestMemory) {
  int pipe_fds[2];
  ASSERT_EQ(pipe(pipe_fds), 0);
  UniqueFd read_end(pipe_fds[0]);
  UniqueFd write_end(pipe_fds[1]);
  EXPECT_THAT(GuestFile::Create(std::move(read_end)), FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(GuestFile::Create(UniqueFd(memfd_create("empty", 0))),
              FailsWith(ErrorCode::kInvalid));
  EXPECT_THAT(GuestFile::Create(UniqueFd()), FailsWith(ErrorCode::kSystem));
}

TEST(GuestFile, TheSameFileHasTheSameIdentityThroughEveryDescriptor) {
  GuestRam ram(kPageSize);
  GuestRam other(kPageSize);
  const UniqueFd again = ram.duplicate();
  EXPECT_EQ(*GuestFile::IdentityOf(ram.fd()), *GuestFile::IdentityOf(again.get()));
  EXPECT_FALSE(*GuestFile::IdentityOf(ram.fd()) == *GuestFile::IdentityOf(other.fd()));
}

TEST(GuestFile, AReadOnlyDescriptorCannotBeWrittenThrough) {
  GuestRam ram(kPageSize);
  const std::string path = "/proc/self/fd/" + std::to_string(ram.fd());
  auto file = GuestFile::Create(UniqueFd(open(path.c_str(), O_RDONLY | O_CLOEXEC)));
  ASSERT_THAT(file, IsOk());
  std::vector<std::byte> bytes(4);
  EXPECT_THAT((*file)->read(0, bytes), IsOk());
  EXPECT_THAT((*file)->write(0, bytes), FailsWith(ErrorCode::kPermission));
}

}  // namespace
}  // namespace mvgpu::domain
