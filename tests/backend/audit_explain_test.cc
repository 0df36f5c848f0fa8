#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/backend/audit_fixture.h"

namespace mvgpu::domain {
namespace {

using ::mvgpu::testing::IsOk;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::MatchesRegex;
using ::testing::Not;

constexpr uint64_t kGiB = 1u << 30;

// Two domains: the vgpu maps kRam at 0 and 4 GiB and holds pages 0 to 99; the nic holds 50 to 1049,
// and pays for what it held first.
class AuditExplainTest : public AuditFixture {
 protected:
  AuditExplainTest() : ledger_(Open()), vgpu_(Join(*ledger_, "vgpu")), nic_(Join(*ledger_, "nic")) {
    vgpu_->list_mapping({*IovaRange::FromStartAndSize(Iova(0), kGiB), Access::kReadWrite, kRam, 0});
    vgpu_->list_mapping(
        {*IovaRange::FromStartAndSize(Iova(4 * kGiB), kGiB), Access::kRead, kRam, kGiB});
    EXPECT_THAT(vgpu_->hold(kRam, 524288, {0, 100}), IsOk());
    EXPECT_THAT(nic_->hold(kRam, 524288, {50, 1000}), IsOk());
  }
  ~AuditExplainTest() override {
    vgpu_->release(kRam, {0, 100});
    nic_->release(kRam, {50, 1000});
  }
  Outcome Explain(const std::string& arguments) const {
    return Run("explain --runtime-dir=" + dir_ + " " + arguments);
  }
  // The one VM's one place.
  nlohmann::json PlaceOf(const std::string& arguments) const {
    const nlohmann::json json = JsonOf(Explain(arguments + " --json"));
    EXPECT_EQ(json["vms"].size(), 1u);
    EXPECT_EQ(json["vms"][0]["places"].size(), 1u);
    return json["vms"][0]["places"][0];
  }

  std::unique_ptr<Ledger> ledger_;
  std::unique_ptr<LedgerRow> vgpu_;
  std::unique_ptr<LedgerRow> nic_;
};

TEST_F(AuditExplainTest, AddressIsExplainedFromMappingToPayer) {
  const Outcome outcome = Explain("0x33004");  // page 51, which both hold
  EXPECT_EQ(outcome.exit_code, 0);
  EXPECT_THAT(outcome.err, IsEmpty());
  EXPECT_THAT(outcome.out,
              AllOf(HasSubstr(std::string("VM ") + kVm + ": 0x33004\n"),
                    HasSubstr("  page 51 (offset 0x33004) of file 1:100\n"),
                    HasSubstr("  vgpu sees it read-write at iova 0x33004, in 0x0-0x3fffffff\n"),
                    HasSubstr("  if vgpu left, nic would pay for it\n"), Not(HasSubstr("note:"))));
  std::istringstream lines(outcome.out);
  for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 100u) << line;
}

TEST_F(AuditExplainTest, JsonHasTheDocumentedFields) {
  const nlohmann::json json = JsonOf(Explain("0x33004 --json"));
  EXPECT_EQ(json["question"], "0x33004");
  EXPECT_EQ(json["page_size"], 4096);
  EXPECT_EQ(json["errors"].size(), 0u);
  ASSERT_EQ(json["vms"].size(), 1u);
  const nlohmann::json& vm = json["vms"][0];
  EXPECT_EQ(vm["vm"], kVm);
  EXPECT_EQ(vm["known"], true);
  EXPECT_EQ(vm["in_motion"], false);
  EXPECT_EQ(vm["unlisted_mappings"], 0);
  ASSERT_EQ(vm["places"].size(), 1u);
  const nlohmann::json& place = vm["places"][0];
  EXPECT_EQ(place["file"].dump(), R"({"device":1,"inode":100})");
  EXPECT_EQ(place["page"], 51);
  EXPECT_EQ(place["offset"], 0x33004);
  EXPECT_EQ(place["payer"], 0);
  EXPECT_EQ(place["next_payer"], 1);
  ASSERT_EQ(place["mappings"].size(), 1u);
  EXPECT_EQ(place["mappings"][0].dump(),
            R"({"access":"read-write","first":"0x0","last":"0x3fffffff","name":"vgpu","row":0})");
  ASSERT_EQ(place["holders"].size(), 2u);
  const nlohmann::json& vgpu = place["holders"][0];
  EXPECT_EQ(vgpu["name"], "vgpu");
  EXPECT_EQ(vgpu["kind"], "api-only");
  EXPECT_EQ(vgpu["pid"], getpid());
  EXPECT_EQ(vgpu["state"], "alive");
  EXPECT_EQ(vgpu["pays"], true);
  EXPECT_EQ(vgpu["charged_pages"], 100);
  EXPECT_TRUE(vgpu["charged_pages_without_payer"].is_null());
  const nlohmann::json& nic = place["holders"][1];
  EXPECT_EQ(nic["row"], 1);
  EXPECT_EQ(nic["pays"], false);
  EXPECT_EQ(nic["charged_pages"], 950);
  EXPECT_EQ(nic["charged_pages_without_payer"], 1000);
}

TEST_F(AuditExplainTest, PagesOfFilesAreExplainedWithoutAddresses) {
  for (const char* question :
       {"1:100:600", "1:100:+2457600", "1:100:+0x258fff", "0x1:0x64:0x258"}) {
    const nlohmann::json place = PlaceOf(question);
    EXPECT_EQ(place["page"], 600) << question;
    EXPECT_EQ(place["payer"], 1) << question;
    EXPECT_TRUE(place["next_payer"].is_null()) << question;
    ASSERT_EQ(place["mappings"].size(), 1u) << question;  // found by the file
    EXPECT_EQ(place["mappings"][0]["first"], "0x0");
  }
  const nlohmann::json high = PlaceOf("1:100:262145");  // in the second mapping
  EXPECT_EQ(high["mappings"][0]["access"], "read");
  EXPECT_EQ(high["mappings"][0]["first"], "0x100000000");
  EXPECT_THAT(high["holders"], IsEmpty());
  EXPECT_THAT(Explain("1:100:600").out, HasSubstr("if nic left, nobody would pay for it\n"));
  EXPECT_THAT(Explain("1:100:262145").out, HasSubstr("vgpu sees it read at iova 0x100001000, in "));
  EXPECT_THAT(Explain("1:100:262145").out, HasSubstr("nobody holds it: nobody pays\n"));
}

TEST_F(AuditExplainTest, FilesAreKnownByTheirPathAsWell) {
  const std::string ram = dir_ + "/ram:1";
  std::ofstream(ram) << "x";
  struct stat st = {};
  ASSERT_EQ(stat(ram.c_str(), &st), 0);
  const FileIdentity file{st.st_dev, st.st_ino};
  ASSERT_THAT(nic_->hold(file, 10, {7, 1}), IsOk());
  const nlohmann::json place = PlaceOf(ram + ":7");
  EXPECT_EQ(place["file"]["inode"], st.st_ino);
  EXPECT_EQ(place["payer"], 1);
  nic_->release(file, {7, 1});
  EXPECT_EQ(Explain(ram + ":7").exit_code, 1);
  const Outcome absent = Explain(dir_ + "/none:7");
  EXPECT_EQ(absent.exit_code, 4);
  EXPECT_THAT(absent.err, MatchesRegex("mvgpu-audit: cannot look at file [^\n]*none[^\n]*\n"));
}

TEST_F(AuditExplainTest, DomainsMaySeeDifferentPagesAtOneAddress) {
  nic_->list_mapping({*IovaRange::FromStartAndSize(Iova(0x33000), 4096), Access::kRead, kRam, 0});
  const nlohmann::json json = JsonOf(Explain("0x33004 --json"));
  ASSERT_EQ(json["vms"][0]["places"].size(), 2u);
  EXPECT_EQ(json["vms"][0]["places"][0]["page"], 51);
  EXPECT_EQ(json["vms"][0]["places"][1]["page"], 0);
  EXPECT_EQ(json["vms"][0]["places"][1]["mappings"][0]["name"], "nic");
  EXPECT_THAT(Explain("0x33004").out,
              AllOf(HasSubstr("page 51 (offset 0x33004)"), HasSubstr("page 0 (offset 0x4)")));
  vgpu_->list_mapping(
      {*IovaRange::FromStartAndSize(Iova(8 * kGiB), 8192), Access::kRead, kOtherRam, 0});
  nic_->list_mapping(
      {*IovaRange::FromStartAndSize(Iova(8 * kGiB), 8192), Access::kRead, kOtherRam, 0});
  EXPECT_EQ(PlaceOf(std::to_string(8 * kGiB))["mappings"].size(), 2u);
}

TEST_F(AuditExplainTest, WhatNobodyHasIsSaidAndExitsWith1) {
  for (const char* question :
       {"0x7fffffffffff", "18446744073709551615", "1:100:262143999", "9:9:9"}) {
    const Outcome outcome = Explain(question);
    EXPECT_EQ(outcome.exit_code, 1) << question;
    EXPECT_THAT(outcome.out, HasSubstr("no domain maps or holds it\n")) << question;
    EXPECT_THAT(outcome.err, IsEmpty());
    const nlohmann::json json = JsonOf(Explain(std::string(question) + " --json"));
    EXPECT_EQ(json["vms"][0]["known"], false) << question;
  }
}

TEST_F(AuditExplainTest, MappingsThatDidNotFitAreSpokenOf) {
  for (uint64_t i = 0; i < 16384; ++i) {
    nic_->list_mapping({*IovaRange::FromStartAndSize(Iova(i << 12), 4096), Access::kRead, kRam, 0});
  }
  EXPECT_THAT(Explain("0x33004").out, Not(HasSubstr("note:")));
  nic_->list_mapping({*IovaRange::FromStartAndSize(Iova(9 * kGiB), 4096), Access::kRead, kRam, 0});
  EXPECT_THAT(Explain("0x33004").out, HasSubstr("note: 1 mappings did not fit into the ledger's"));
  EXPECT_EQ(ShowJson()["vms"][0]["domains"][1]["unlisted_mappings"], 1);
}

TEST_F(AuditExplainTest, VmsAreChosenAsInShow) {
  auto other = Ledger::Open({dir_, kOtherVm});
  ASSERT_THAT(other, IsOk());
  const nlohmann::json both = JsonOf(Explain("0x33004 --json"));
  ASSERT_EQ(both["vms"].size(), 2u);
  EXPECT_EQ(both["vms"][0]["known"], true);
  EXPECT_EQ(both["vms"][1]["known"], false);
  EXPECT_EQ(Explain("0x33004").exit_code, 0) << "one of them has it";
  EXPECT_EQ(Explain(std::string("0x33004 --vm=") + kOtherVm).exit_code, 1);
  EXPECT_EQ(Explain("0x33004 --vm=12345678-0000-4000-8000-000000000000").exit_code, 3);
  std::ofstream(dir_ + "/eeeeeeee-0000-4000-8000-000000000001.ledger") << "noise";
  const Outcome outcome = Explain("0x33004");
  EXPECT_EQ(outcome.exit_code, 4);
  EXPECT_THAT(outcome.out, HasSubstr("if vgpu left"));
  EXPECT_THAT(outcome.err, HasSubstr("eeeeeeee-0000"));
}

TEST_F(AuditExplainTest, QuestionsThatMakeNoSenseAreRefused) {
  for (const char* question : {"12q", "0x", "''", "-- -1", "1:100:", "1:100:+", ":7",
                               "0x1ffffffffffffffff", "1:100:4503599627370496", "1:100:0x7q"}) {
    ExpectRefused("explain --runtime-dir=" + dir_ + " " + question, "is neither an address");
  }
  ExpectRefused("explain --runtime-dir=" + dir_, "ADDRESS");
}

TEST_F(AuditExplainTest, ExplainingChangesNothing) {
  const std::string before = ReadBytes();
  EXPECT_EQ(Explain("0x33004").exit_code, 0);
  EXPECT_EQ(ReadBytes(), before);
}

}  // namespace
}  // namespace mvgpu::domain
