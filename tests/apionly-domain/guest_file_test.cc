#include "apionly-domain/memory/guest_file.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <vector>

#include "apionly-domain/memory/guarded_copy.h"
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

TEST(GuestFile, GuardedCopiesReadAndWriteGuestBytes) {
  GuestRam ram(4 * kPageSize);
  ram.fill_pattern();
  auto file = Open(ram);
  std::vector<std::byte> copy(5000);
  ASSERT_TRUE(CopyGuarded(copy.data(), file->host_address(3000), copy.size()));
  EXPECT_EQ(std::memcmp(copy.data(), ram.at(3000), copy.size()), 0);
  const std::array<std::byte, 3> news = {std::byte{1}, std::byte{2}, std::byte{3}};
  ASSERT_TRUE(CopyGuarded(file->host_address(4095), news.data(), news.size()));
  EXPECT_EQ(*ram.at(4097), std::byte{3});
}

TEST(GuestFile, ATruncationIsAnAnswerNotACrash) {
  GuestRam ram(4 * kPageSize, /*seals=*/0);
  auto file = Open(ram);
  EXPECT_FALSE(file->is_sealed_against_shrinking());
  std::array<std::byte, 16> copy{};
  ASSERT_TRUE(CopyGuarded(copy.data(), file->host_address(3 * kPageSize), copy.size()));
  ASSERT_EQ(ftruncate(ram.fd(), kPageSize), 0);
  for (int i = 0; i < 3; ++i) {  // more than once: the signal must not stay blocked
    EXPECT_FALSE(CopyGuarded(copy.data(), file->host_address(3 * kPageSize), copy.size()));
    EXPECT_FALSE(CopyGuarded(file->host_address(2 * kPageSize), copy.data(), copy.size()));
  }
  EXPECT_TRUE(CopyGuarded(copy.data(), file->host_address(0), copy.size()));
}

// So that a run of host memory never goes from one file into another.
TEST(GuestFile, NothingIsMappedRightBehindAFile) {
  GuestRam first(2 * kPageSize);
  GuestRam second(2 * kPageSize);
  const auto a = Open(first);
  const auto b = Open(second);
  EXPECT_NE(a->host_address(0) + a->size(), b->host_address(0));
  EXPECT_NE(b->host_address(0) + b->size(), a->host_address(0));
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
  EXPECT_FALSE((*file)->is_writable());
  EXPECT_TRUE(Open(ram)->is_writable());
}

}  // namespace
}  // namespace mvgpu::domain
