#include "tests/bench/vulkan_rows.h"

#include <dlfcn.h>

#include <memory>
#include <utility>
#include <vector>

#include "dma-cache/vulkan/vulkan_device.h"
#include "dma-cache/vulkan/vulkan_mapper.h"
#include "tests/bench/bench_guest.h"
#include "tests/bench/page_slices.h"

namespace mvgpu::bench {

namespace {

using dma::HostAddr;
using dma::HostRange;
using dma::ImportedPieces;

// Mesa's device keeps memory of its own until the end of the process: LeakSanitizer finds it again
// only while the library is loaded.
[[maybe_unused]] void* const kept_loaded = dlopen("libvulkan_lvp.so", RTLD_LAZY | RTLD_NODELETE);

constexpr uint64_t kMemory = uint64_t{1} << 30;
constexpr char kBareImport[] = "vulkan import, buffer, address, and their end";

// A guest in one mapping, and a mapper that imports it for the first device that can.
class Subject {
 public:
  static Result<std::shared_ptr<Subject>> Create(const Settings& settings) {
    MVGPU_ASSIGN_OR_RETURN(auto loader, dma::VulkanLoader::Open({}));
    MVGPU_ASSIGN_OR_RETURN(auto device, dma::VulkanDevice::Create(std::move(loader), {}));
    return std::shared_ptr<Subject>(new Subject(std::move(device), settings));
  }
  ~Subject() {
    for (const dma::MappedRun& run : held_) mapper_.unmap(run.address, run.iova.size());
  }

  // Maps a page of each piece until the end.
  Result<void> ImportAll() {
    for (Iova iova = FirstOfPiece(); iova < Iova(kMemory);
         iova = iova + ImportedPieces::kPieceBytes) {
      MVGPU_RETURN_IF_ERROR(Map(iova, &held_));
    }
    return Map(Iova(0), &held_);  // what is before the first whole piece
  }
  // Maps and unmaps the pages of a round, each for itself.
  void Hits(uint64_t round) {
    for (const Iova page : pages_.round(round)) {
      mapped_.clear();
      MVGPU_CHECK(Map(page, &mapped_).has_value());
      mapper_.unmap(mapped_.front().address, kPageSize);
    }
  }
  // Maps a page of which nothing is imported, and takes all away again.
  void Import() {
    mapped_.clear();
    MVGPU_CHECK(Map(FirstOfPiece(), &mapped_).has_value());
    mapper_.unmap(mapped_.front().address, kPageSize);
    mapper_.flush();
  }
  // The Vulkan calls of that, and nothing else.
  void ImportBare() {
    uint64_t calls = 0;
    const HostAddr host(reinterpret_cast<uint64_t>(guest_.host(FirstOfPiece())));
    const auto buffer = dma::ImportedBuffer::Create(
        &device_->target(),
        HostRange::FromFirstAndLast(host, host + (ImportedPieces::kPieceBytes - 1)), &calls);
    MVGPU_CHECK(buffer.has_value());
    Keep(buffer->address().value());
  }

  uint64_t vulkan_calls() const {
    for (const auto& [name, value] : mapper_.figures())
      if (name == "vulkan_calls") return value;
    return 0;
  }
  uint64_t hits_per_round() const { return pages_.per_round(); }

 private:
  Subject(std::unique_ptr<dma::VulkanDevice> device, const Settings& settings)
      : guest_(Layout::OneMapping(kMemory), domain::MakeNonePinBackend()),
        device_(std::move(device)),
        mapper_(device_->target(),
                {.mapping_at = [this](Iova iova) { return guest_.container().mapping_at(iova); }}),
        pages_(PageSlices(GuestPages(PagesIn(kMemory), guest_.layout())
                              .random(settings.work(1 << 20), /*seed=*/7),
                          settings.work(1 << 17))) {}

  Result<void> Map(Iova iova, std::vector<dma::MappedRun>* mapped) {
    const domain::PinnedRun run{*IovaRange::FromStartAndSize(iova, kPageSize), guest_.host(iova)};
    return mapper_.map({&run, 1}, domain::Access::kReadWrite, mapped);
  }
  // Pieces are aligned in host memory.
  Iova FirstOfPiece() const {
    const uint64_t host = reinterpret_cast<uint64_t>(guest_.host(Iova(0)));
    return Iova(-host & (ImportedPieces::kPieceBytes - 1));
  }

  Guest guest_;
  const std::unique_ptr<dma::VulkanDevice> device_;
  dma::VulkanMapper mapper_;
  const PageSlices pages_;
  std::vector<dma::MappedRun> held_;
  std::vector<dma::MappedRun> mapped_;
};

Side Imports(std::shared_ptr<Subject> subject, uint64_t times, void (Subject::*import)()) {
  return Timed(times, [subject = std::move(subject), times, import](uint64_t) {
    for (uint64_t i = 0; i < times; ++i) ((*subject).*import)();
  });
}

Result<std::shared_ptr<Subject>> AllImported(const Settings& settings) {
  MVGPU_ASSIGN_OR_RETURN(auto subject, Subject::Create(settings));
  MVGPU_RETURN_IF_ERROR(subject->ImportAll());
  return subject;
}

}  // namespace

void MeasureVulkan(Table* table) {
  const Settings& settings = table->settings();
  const uint64_t imports = settings.work(20000);

  table->compare(
      "vulkan mapper, page of an imported piece", kBareImport, {}, [&]() -> Result<Comparison> {
        MVGPU_ASSIGN_OR_RETURN(auto subject, AllImported(settings));
        MVGPU_ASSIGN_OR_RETURN(auto bare, Subject::Create(settings));
        return Comparison{
            Timed(subject->hits_per_round(), [subject](uint64_t round) { subject->Hits(round); }),
            Imports(std::move(bare), imports, &Subject::ImportBare)};
      });
  table->measure("vulkan mapper, vulkan calls for pages of imported pieces", "calls", "none",
                 Target::AtMost(0), [&]() -> Result<double> {
                   MVGPU_ASSIGN_OR_RETURN(auto subject, AllImported(settings));
                   const uint64_t before = subject->vulkan_calls();
                   subject->Hits(0);
                   return static_cast<double>(subject->vulkan_calls() - before);
                 });
  table->compare("vulkan mapper, first and last page of a piece", kBareImport, {},
                 [&]() -> Result<Comparison> {
                   MVGPU_ASSIGN_OR_RETURN(auto subject, Subject::Create(settings));
                   return Comparison{Imports(subject, imports, &Subject::Import),
                                     Imports(subject, imports, &Subject::ImportBare)};
                 });
}

}  // namespace mvgpu::bench
