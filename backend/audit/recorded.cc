#include "backend/audit/recorded.h"

#include <fmt/format.h>

#include <iterator>
#include <nlohmann/json.hpp>
#include <string_view>

#include "backend/audit/console.h"

namespace mvgpu::backend {

namespace {

using Out = std::back_insert_iterator<std::string>;

// Names in a trace may be anything.
std::string Printable(std::string text) {
  for (char& c : text) {
    if (c < 0x20 || c > 0x7e) c = '?';
  }
  return text;
}

void RenderMoment(Out out, std::string_view which, const TraceAccounts::Moment& moment) {
  const AccountFigures& figures = moment.figures;
  const std::string percent =
      figures.mapped_pages == 0
          ? "-"
          : fmt::format("{:.2f}", 100.0 * static_cast<double>(figures.unique_pages) /
                                      static_cast<double>(figures.mapped_pages));
  fmt::format_to(out, "  {:<7} {:>12.6f} {:>10} {:>9} {:>6} {:>9} {:>9} {:>9}\n", which,
                 static_cast<double>(moment.time_ns) / 1e9, figures.mapped_pages,
                 figures.pinned_pages, percent, figures.unique_pages, figures.charged_pages,
                 figures.locked_pages);
}

}  // namespace

std::string RenderText(const TraceAccounts& accounts, const std::string& path) {
  std::string text;
  const Out out = std::back_inserter(text);
  fmt::format_to(out, "VM {}\n  {}\n", Printable(accounts.vm_uuid()), path);
  if (!accounts.last()) {
    fmt::format_to(out, "  no accounts were recorded\n");
    return text;
  }
  fmt::format_to(out, "  {}, pinned by {}; the accounts changed {} times\n",
                 Printable(accounts.name()), Printable(accounts.pin_backend()), accounts.changes());
  fmt::format_to(out, "  {:<7} {:>12} {:>10} {:>9} {:>6} {:>9} {:>9} {:>9}\n", "MOMENT", "SECONDS",
                 "MAPPED", "PINNED", "UNIQ%", "UNIQUE", "CHARGED", "LOCKED");
  RenderMoment(out, "peak", *accounts.peak());
  RenderMoment(out, "last", *accounts.last());
  return text;
}

int ShowRecorded(const std::string& path, bool json) {
  const auto accounts = TraceAccounts::ReadFrom(path);
  if (!accounts) return Complain(kAuditUnreadable, accounts.error().message());
  if (!json) return Print(RenderText(*accounts, path));
  return Print(ToJson(*accounts).dump(2, ' ', false, nlohmann::json::error_handler_t::replace) +
               "\n");
}

}  // namespace mvgpu::backend
