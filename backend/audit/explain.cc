#include "backend/audit/explain.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <charconv>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

#include "apionly-domain/accounting/runtime_dir.h"
#include "backend/audit/accounts.h"
#include "backend/audit/console.h"

namespace mvgpu::backend {

using domain::LedgerSnapshot;
using domain::RowMappingList;

namespace {

std::optional<uint64_t> NumberIn(std::string_view text) {
  const bool is_hex = text.starts_with("0x") || text.starts_with("0X");
  if (is_hex) text.remove_prefix(2);
  uint64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, value, is_hex ? 16 : 10);
  if (text.empty() || parsed.ec != std::errc() || parsed.ptr != end) return std::nullopt;
  return value;
}

tl::unexpected<Error> BadQuestion(const std::string& text) {
  return Fail(ErrorCode::kInvalid,
              fmt::format("'{}' is neither an address (0x1000, 4096) nor a place in a file "
                          "(FILE:PAGE, FILE:+OFFSET; FILE is a path or DEVICE:INODE)",
                          text));
}

Result<domain::FileIdentity> IdentityOf(const std::string& name) {
  const size_t colon = name.find(':');
  if (colon != std::string::npos) {
    const auto device = NumberIn(std::string_view(name).substr(0, colon));
    const auto inode = NumberIn(std::string_view(name).substr(colon + 1));
    if (device && inode) return domain::FileIdentity{*device, *inode};
  }
  struct stat status = {};
  if (::stat(name.c_str(), &status) != 0) {
    return FailSystem(errno, fmt::format("cannot look at file '{}'", name));
  }
  return domain::GuestFile::IdentityOf(status);
}

const LedgerSnapshot::Row* Find(const std::vector<LedgerSnapshot::Row>& rows, unsigned index) {
  for (const LedgerSnapshot::Row& row : rows) {
    if (row.index == index) return &row;
  }
  return nullptr;
}

std::string NameOf(const PageAnswer& answer, unsigned index) {
  const LedgerSnapshot::Row* row = Find(answer.rows, index);
  return row == nullptr ? fmt::format("row {}, which nobody has,", index) : row->name;
}

// An open ledger, asked again and again.
struct OpenLedger {
  UniqueFd fd;
  std::string path;
  std::string vm_uuid;
};

void AddPlace(const RowMappingList::Entry& entry, uint64_t offset, PageAnswer& answer) {
  for (PageAnswer::Place& place : answer.places) {
    if (place.file != entry.mapping.file || place.offset != offset) continue;
    place.seen_by.push_back(entry);
    return;
  }
  PageAnswer::Place& place = answer.places.emplace_back();
  place.file = entry.mapping.file;
  place.offset = offset;
  place.seen_by.push_back(entry);
}

Result<void> FindPlaces(const OpenLedger& ledger, const PageQuestion& question,
                        PageAnswer& answer) {
  MVGPU_ASSIGN_OR_RETURN(
      const RowMappingList list,
      domain::ReadMappings(ledger.fd.get(), ledger.path, ledger.vm_uuid, question.iova));
  answer.in_motion |= list.in_motion;
  if (!question.iova) {
    PageAnswer::Place& place = answer.places.emplace_back();
    place.file = question.file;
    place.offset = question.offset;
  }
  for (const RowMappingList::Entry& entry : list.entries) {
    const domain::LedgerMapping& mapping = entry.mapping;
    if (question.iova) {
      AddPlace(entry, mapping.file_offset + (*question.iova - mapping.iova.start()), answer);
    } else if (mapping.file == question.file && question.offset >= mapping.file_offset &&
               question.offset - mapping.file_offset < mapping.iova.size()) {
      answer.places[0].seen_by.push_back(entry);
    }
  }
  return {};
}

Result<void> FindHolders(const OpenLedger& ledger, PageAnswer::Place& place, PageAnswer& answer) {
  MVGPU_ASSIGN_OR_RETURN(
      place.page, domain::ReadPageHolders(ledger.fd.get(), ledger.path, ledger.vm_uuid, place.file,
                                          PagesIn(place.offset)));
  answer.in_motion |= place.page.in_motion;
  if (!place.page.payer) return {};
  MVGPU_ASSIGN_OR_RETURN(
      const LedgerSnapshot without,
      domain::ReadLedgerWithout(ledger.fd.get(), ledger.path, ledger.vm_uuid, *place.page.payer));
  answer.in_motion |= without.in_motion;
  for (const unsigned index : place.page.rows) {
    const LedgerSnapshot::Row* row = Find(answer.rows, index);
    if (row == nullptr) continue;
    PageAnswer::Holder& holder = place.holders.emplace_back();
    holder.row = *row;
    if (const auto* then = Find(without.rows, index)) {
      holder.charged_without_payer = then->charged_pages;
    }
  }
  return {};
}

using Out = std::back_insert_iterator<std::string>;

void RenderHolders(Out out, const PageAnswer& answer, const PageAnswer::Place& place) {
  if (place.page.rows.empty()) {
    fmt::format_to(out, "  nobody holds it: nobody pays\n");
    return;
  }
  fmt::format_to(out, "  {:<20} {:<9} {:>7} {:<7} {:<5} {:>12} {:>20}\n", "HELD BY", "KIND", "PID",
                 "STATE", "PAYS", "CHARGED", "IF THE PAYER LEFT");
  for (const PageAnswer::Holder& holder : place.holders) {
    const LedgerSnapshot::Row& row = holder.row;
    fmt::format_to(
        out, "  {:<20.20} {:<9.9} {:>7} {:<7} {:<5} {:>12} {:>20}\n", row.name,
        domain::DomainKindName(row.kind), row.owner.pid, StateName(row.liveness),
        row.index == place.page.payer ? "yes" : "no", row.charged_pages,
        holder.charged_without_payer ? fmt::format("{}", *holder.charged_without_payer) : "-");
  }
  fmt::format_to(out, "  if {:.40} left, {:.40} would pay for it\n",
                 NameOf(answer, *place.page.payer),
                 place.page.next_payer ? NameOf(answer, *place.page.next_payer) : "nobody");
}

void RenderPlace(Out out, const PageAnswer& answer, const PageAnswer::Place& place) {
  fmt::format_to(out, "  page {} (offset {:#x}) of file {}:{}\n", PagesIn(place.offset),
                 place.offset, place.file.device, place.file.inode);
  for (const RowMappingList::Entry& entry : place.seen_by) {
    const LedgerSnapshot::Row* row = Find(answer.rows, entry.row);
    fmt::format_to(out, "  {:.40} sees it {} at iova {:#x}, in {:#x}-{:#x}{}\n",
                   NameOf(answer, entry.row), AccessName(entry.mapping.access),
                   entry.mapping.iova.start().value() + (place.offset - entry.mapping.file_offset),
                   entry.mapping.iova.start().value(), entry.mapping.iova.last().value(),
                   row != nullptr && row->is_registered ? " (as a vgpu does)" : "");
  }
  RenderHolders(out, answer, place);
}

uint64_t UnlistedMappings(const PageAnswer& answer) {
  uint64_t mappings = 0;
  for (const LedgerSnapshot::Row& row : answer.rows) mappings += row.unlisted_mappings;
  return mappings;
}

nlohmann::json RowOrNull(const std::optional<unsigned>& row) {
  return row ? nlohmann::json(*row) : nlohmann::json();
}

nlohmann::json PlaceJson(const PageAnswer& answer, const PageAnswer::Place& place) {
  nlohmann::json mappings = nlohmann::json::array();
  for (const RowMappingList::Entry& entry : place.seen_by) {
    mappings.push_back({{"row", entry.row},
                        {"name", NameOf(answer, entry.row)},
                        {"first", fmt::format("{:#x}", entry.mapping.iova.start().value())},
                        {"last", fmt::format("{:#x}", entry.mapping.iova.last().value())},
                        {"access", AccessName(entry.mapping.access)}});
  }
  nlohmann::json holders = nlohmann::json::array();
  for (const PageAnswer::Holder& holder : place.holders) {
    const LedgerSnapshot::Row& row = holder.row;
    holders.push_back({{"row", row.index},
                       {"name", row.name},
                       {"kind", domain::DomainKindName(row.kind)},
                       {"pid", row.owner.pid},
                       {"state", StateName(row.liveness)},
                       {"pays", row.index == place.page.payer},
                       {"charged_pages", row.charged_pages},
                       {"charged_pages_without_payer",
                        holder.charged_without_payer ? nlohmann::json(*holder.charged_without_payer)
                                                     : nlohmann::json()}});
  }
  return {{"file", {{"device", place.file.device}, {"inode", place.file.inode}}},
          {"page", PagesIn(place.offset)},
          {"offset", place.offset},
          {"mappings", std::move(mappings)},
          {"holders", std::move(holders)},
          {"payer", RowOrNull(place.page.payer)},
          {"next_payer", RowOrNull(place.page.next_payer)}};
}

}  // namespace

CLI::App* ExplainOptions::add_to(CLI::App& app) {
  CLI::App* const verb =
      app.add_subcommand("explain", "Say what lies behind an address, who holds it and who pays");
  verb->footer(
      "ADDRESS is what the guest's devices use (a guest-physical address, or an I/O virtual one "
      "behind\na vIOMMU): 0x1f400000 or 524288000. FILE:PAGE and FILE:+OFFSET name a page of the "
      "VM's memory\nfile; FILE is a path, as /proc/PID/fd/N, or DEVICE:INODE as show --json has "
      "them.\nCHARGED is what a domain pays for in all, and what it would if the payer of this "
      "page "
      "left.\n\n"
      "Exit codes:\n"
      "  0  a domain maps or holds the page\n"
      "  1  none does\n"
      "  2  wrong usage\n"
      "  3  the VM that --vm names has no ledger\n"
      "  4  a ledger, the runtime directory or FILE could not be read, or stdout not be written");
  verb->add_option("ADDRESS", question, "an address, FILE:PAGE or FILE:+OFFSET")->required();
  ledgers.add_to(*verb);
  verb->add_flag("--json", json, "one JSON object instead of text");
  return verb;
}

Result<PageQuestion> ParsePageQuestion(const std::string& text) {
  PageQuestion question;
  question.text = text;
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos) {
    const auto address = NumberIn(text);
    if (!address) return BadQuestion(text);
    question.iova = Iova(*address);
    return question;
  }
  std::string_view place = std::string_view(text).substr(colon + 1);
  const bool is_offset = place.starts_with('+');
  if (is_offset) place.remove_prefix(1);
  const auto number = NumberIn(place);
  const auto offset = !number || is_offset ? number : CheckedMul(*number, kPageSize);
  if (!offset || colon == 0) return BadQuestion(text);
  question.offset = *offset;
  MVGPU_ASSIGN_OR_RETURN(question.file, IdentityOf(text.substr(0, colon)));
  return question;
}

bool PageAnswer::is_known() const {
  return std::any_of(places.begin(), places.end(), [](const Place& place) {
    return !place.seen_by.empty() || !place.page.rows.empty();
  });
}

Result<PageAnswer> AskLedger(const std::string& runtime_dir, const std::string& vm_uuid,
                             const PageQuestion& question) {
  MVGPU_ASSIGN_OR_RETURN(const domain::RuntimeDir dir,
                         domain::RuntimeDir::OpenForReading(runtime_dir));
  const std::string name = domain::LedgerFileName(vm_uuid);
  OpenLedger ledger{{}, dir.path_of(name), vm_uuid};
  MVGPU_ASSIGN_OR_RETURN(ledger.fd, dir.open_file(name, O_RDONLY));
  PageAnswer answer;
  answer.vm_uuid = vm_uuid;
  MVGPU_ASSIGN_OR_RETURN(LedgerSnapshot snapshot,
                         domain::ReadLedgerFile(ledger.fd.get(), ledger.path, vm_uuid));
  answer.in_motion = snapshot.in_motion;
  answer.rows = std::move(snapshot.rows);
  MVGPU_RETURN_IF_ERROR(FindPlaces(ledger, question, answer));
  for (PageAnswer::Place& place : answer.places) {
    MVGPU_RETURN_IF_ERROR(FindHolders(ledger, place, answer));
  }
  return answer;
}

std::string RenderText(const PageAnswer& answer, const PageQuestion& question) {
  std::string text = fmt::format("VM {}: {}\n", answer.vm_uuid, question.text);
  const Out out = std::back_inserter(text);
  if (!answer.is_known()) fmt::format_to(out, "  no domain maps or holds it\n");
  for (const PageAnswer::Place& place : answer.places) {
    if (answer.is_known()) RenderPlace(out, answer, place);
  }
  if (const uint64_t unlisted = UnlistedMappings(answer); unlisted != 0) {
    fmt::format_to(
        out, "  note: {} mappings did not fit into the ledger's lists, and are not seen here\n",
        unlisted);
  }
  if (answer.in_motion) {
    fmt::format_to(out, "  note: figures were in motion while they were read\n");
  }
  return text;
}

nlohmann::json ToJson(const PageAnswer& answer) {
  nlohmann::json places = nlohmann::json::array();
  for (const PageAnswer::Place& place : answer.places) places.push_back(PlaceJson(answer, place));
  return {{"vm", answer.vm_uuid},
          {"known", answer.is_known()},
          {"in_motion", answer.in_motion},
          {"unlisted_mappings", UnlistedMappings(answer)},
          {"places", std::move(places)}};
}

int Explain(const ExplainOptions& options) {
  const auto question = ParsePageQuestion(options.question);
  if (!question) {
    const bool is_usage = question.error().code() == ErrorCode::kInvalid;
    return Complain(is_usage ? kAuditUsage : kAuditUnreadable, question.error().message());
  }
  auto report = ReadAccounts(options.ledgers);
  if (!report) return report.error();
  std::string text;
  nlohmann::json vms = nlohmann::json::array();
  bool is_known = false;
  for (const AuditReport::Vm& vm : report->vms) {
    auto answer = AskLedger(report->runtime_dir, vm.ledger.vm_uuid, *question);
    if (!answer) {
      report->unreadable.push_back({vm.ledger.vm_uuid, std::move(answer).error()});
      continue;
    }
    is_known |= answer->is_known();
    text += RenderText(*answer, *question);
    vms.push_back(ToJson(*answer));
  }
  if (options.json) {
    const nlohmann::json json = {{"question", question->text},
                                 {"page_size", kPageSize},
                                 {"vms", std::move(vms)},
                                 {"errors", ErrorsJson(*report)}};
    text = json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  } else if (text.empty() && report->unreadable.empty()) {
    text = fmt::format("no VM has a ledger in {}\n", report->runtime_dir);
  }
  return Answer(text, *report, is_known ? kAuditOk : kAuditProblem);
}

}  // namespace mvgpu::backend
