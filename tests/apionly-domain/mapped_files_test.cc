#include "apionly-domain/pin/mapped_files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "tests/fakes/guest_ram.h"
#include "tests/fakes/result_matchers.h"

namespace mvgpu::domain {
namespace {

using testing::GuestRam;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::MakeRange;
using ::testing::UnorderedElementsAre;

// (first IOVA page, pages, first file page)
using Seen = std::tuple<uint64_t, uint64_t, uint64_t>;

class MappedFilesTest : public ::testing::Test {
 protected:
  static std::shared_ptr<GuestFile> Open(const GuestRam& ram) {
    auto file = GuestFile::Create(ram.duplicate());
    EXPECT_THAT(file, IsOk());
    return std::move(*file);
  }
  Mapping MappingOf(uint64_t iova_page, uint64_t pages, uint64_t file_page) const {
    return {MakeRange(BytesIn(iova_page), BytesIn(pages)), Access::kReadWrite, file_,
            BytesIn(file_page)};
  }
  static std::vector<Seen> SeenOf(const std::vector<MappedFiles::View>& views) {
    std::vector<Seen> seen;
    for (const auto& view : views) {
      seen.emplace_back(view.iova.first, view.iova.count, view.file_page);
    }
    return seen;
  }
  std::vector<Seen> Aliases(uint64_t file_page, uint64_t pages) const {
    return SeenOf(files_.aliases({file_.get(), {file_page, pages}}));
  }
  std::vector<Seen> Views(uint64_t file_page, uint64_t pages) const {
    return SeenOf(files_.views({file_.get(), {file_page, pages}}));
  }

  GuestRam ram_{64 * kPageSize};
  GuestRam other_ram_{64 * kPageSize};
  std::shared_ptr<GuestFile> file_ = Open(ram_);
  std::shared_ptr<GuestFile> other_file_ = Open(other_ram_);
  MappedFiles files_{/*indexed=*/true};
};

TEST_F(MappedFilesTest, HostAddressesLeadToPagesOfTheirFile) {
  files_.add(MappingOf(100, 32, 16));
  files_.add({MakeRange(0, kPageSize), Access::kRead, other_file_, 0});
  const FilePages pages = files_.at(file_->host_address(BytesIn(20)), 8);
  EXPECT_EQ(pages.file, file_.get());
  EXPECT_EQ(pages.pages, (PageRun{20, 8}));
  EXPECT_EQ(files_.at(other_file_->host_address(0), 1).file, other_file_.get());
  EXPECT_EQ(files_.at(file_->host_address(BytesIn(60)), 100).pages, (PageRun{60, 4}))
      << "not beyond the file";
}

TEST_F(MappedFilesTest, AFileThatIsMappedOnceHasNoAliases) {
  files_.add(MappingOf(100, 32, 0));
  files_.add(MappingOf(200, 32, 32));
  EXPECT_THAT(Aliases(0, 64), IsEmpty());
}

TEST_F(MappedFilesTest, EveryIovaThatShowsAPageIsFoundAndCutDownToIt) {
  files_.add(MappingOf(100, 32, 0));
  files_.add(MappingOf(200, 32, 16));
  files_.add(MappingOf(300, 4, 60));
  EXPECT_THAT(Aliases(20, 4), UnorderedElementsAre(Seen{120, 4, 20}, Seen{204, 4, 20}));
  EXPECT_THAT(Aliases(14, 4), UnorderedElementsAre(Seen{114, 4, 14}, Seen{200, 2, 16}));
}

TEST_F(MappedFilesTest, CuttingAViewKeepsBothEnds) {
  files_.add(MappingOf(100, 32, 0));
  files_.add(MappingOf(200, 32, 0));
  files_.remove(MappingOf(210, 4, 10));
  EXPECT_THAT(Aliases(8, 8),
              UnorderedElementsAre(Seen{108, 8, 8}, Seen{208, 2, 8}, Seen{214, 2, 14}));
  files_.remove(MappingOf(200, 10, 0));
  files_.remove(MappingOf(214, 18, 14));
  EXPECT_THAT(Aliases(0, 32), IsEmpty()) << "each page is mapped once again";
}

TEST_F(MappedFilesTest, ViewsAreFoundByPageWhereEachIsMappedOnce) {
  files_.add(MappingOf(100, 8, 32));
  files_.add(MappingOf(200, 8, 16));  // a hole behind it
  files_.add(MappingOf(108, 8, 40));
  EXPECT_THAT(Views(20, 16), UnorderedElementsAre(Seen{204, 4, 20}, Seen{100, 4, 32}));
  EXPECT_THAT(Views(32, 1), UnorderedElementsAre(Seen{100, 1, 32}));
  EXPECT_THAT(Views(0, 64),
              UnorderedElementsAre(Seen{200, 8, 16}, Seen{100, 8, 32}, Seen{108, 8, 40}));
  EXPECT_THAT(Views(24, 8), IsEmpty());
  EXPECT_THAT(Views(48, 16), IsEmpty());
  files_.remove(MappingOf(202, 2, 18));
  EXPECT_THAT(Views(16, 8), UnorderedElementsAre(Seen{200, 2, 16}, Seen{204, 4, 20}));
  files_.add(MappingOf(300, 1, 17));  // twice now
  EXPECT_THAT(Views(17, 4),
              UnorderedElementsAre(Seen{201, 1, 17}, Seen{300, 1, 17}, Seen{204, 1, 20}));
}

TEST_F(MappedFilesTest, AFileIsFoundAsLongAsSomeOfItIsMapped) {
  EXPECT_EQ(files_.find(file_->identity()), nullptr);
  files_.add(MappingOf(100, 8, 32));
  files_.add({MakeRange(0, kPageSize), Access::kRead, other_file_, 0});
  EXPECT_EQ(files_.find(file_->identity()), file_.get());
  EXPECT_EQ(files_.find(other_file_->identity()), other_file_.get());
  files_.remove(MappingOf(100, 4, 32));
  EXPECT_EQ(files_.find(file_->identity()), file_.get());
  files_.remove(MappingOf(104, 4, 36));
  EXPECT_EQ(files_.find(file_->identity()), nullptr);
}

TEST_F(MappedFilesTest, RemovingWhatWasNotAddedIsABug) {
  EXPECT_DEATH(files_.remove(MappingOf(0, 1, 0)), "check failed");
  files_.add(MappingOf(100, 4, 0));
  EXPECT_DEATH(files_.remove(MappingOf(100, 5, 0)), "check failed");
}

}  // namespace
}  // namespace mvgpu::domain
