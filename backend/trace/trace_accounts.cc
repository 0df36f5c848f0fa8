#include "backend/trace/trace_accounts.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "backend/trace/byte_codec.h"
#include "backend/trace/trace_json.h"
#include "backend/trace/trace_reader.h"

namespace mvgpu::backend {

namespace {

std::string TextIn(const nlohmann::json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_string() ? it->get<std::string>() : std::string();
}

nlohmann::json ToJson(const std::optional<TraceAccounts::Moment>& moment) {
  if (!moment) return nullptr;
  return {{"seconds", static_cast<double>(moment->time_ns) / 1e9},
          {"mapped_pages", moment->figures.mapped_pages},
          {"pinned_pages", moment->figures.pinned_pages},
          {"unique_pages", moment->figures.unique_pages},
          {"charged_pages", moment->figures.charged_pages},
          {"locked_pages", moment->figures.locked_pages}};
}

}  // namespace

void AccountFigures::write_to(ByteWriter& writer) const {
  for (const uint64_t pages :
       {mapped_pages, pinned_pages, unique_pages, charged_pages, locked_pages}) {
    writer.varint(pages);
  }
}

std::optional<AccountFigures> AccountFigures::FromPayload(std::span<const std::byte> payload) {
  ByteReader reader(payload);
  AccountFigures figures;
  for (uint64_t* const pages : {&figures.mapped_pages, &figures.pinned_pages, &figures.unique_pages,
                                &figures.charged_pages, &figures.locked_pages}) {
    const auto number = reader.varint();
    if (!number) return std::nullopt;
    *pages = *number;
  }
  return figures;
}

void TraceAccounts::on_session(std::string_view session_json) {
  const auto session = ParseTraceJson(session_json);
  if (!session) return;
  vm_uuid_ = TextIn(*session, "vm_uuid");
  name_ = TextIn(*session, "name");
  pin_backend_ = TextIn(*session, "pin");
}

void TraceAccounts::on_figures(uint64_t time_ns, const AccountFigures& figures) {
  ++changes_;
  last_ = {time_ns, figures};
  if (!peak_ || figures.unique_pages > peak_->figures.unique_pages) peak_ = last_;
}

Result<TraceAccounts> TraceAccounts::ReadFrom(const std::string& path) {
  MVGPU_ASSIGN_OR_RETURN(const auto reader, TraceReader::Open(path));
  TraceAccounts accounts;
  while (true) {
    MVGPU_ASSIGN_OR_RETURN(const auto record, reader->next());
    if (!record) return accounts;
    if (record->type == TraceType::kSession) {
      accounts.on_session(ByteReader(record->payload).rest_as_text());
    }
    if (record->type != TraceType::kAccounts) continue;
    const auto figures = AccountFigures::FromPayload(record->payload);
    if (!figures) {
      return Fail(ErrorCode::kCorrupt, fmt::format("{}: an accounts record is too short", path));
    }
    accounts.on_figures(record->time_ns, *figures);
  }
}

nlohmann::json ToJson(const TraceAccounts& accounts) {
  return {{"vm", accounts.vm_uuid()},
          {"name", accounts.name()},
          {"pin_backend", accounts.pin_backend()},
          {"changes", accounts.changes()},
          {"peak", ToJson(accounts.peak())},
          {"last", ToJson(accounts.last())}};
}

}  // namespace mvgpu::backend
