#include "backend/audit/preflight.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string_view>
#include <utility>

#include "backend/audit/console.h"
#include "backend/cli_options.h"

namespace mvgpu::backend {

namespace {

constexpr char kFooter[] =
    "Devices:\n"
    "  vfio     assigned PCI device, VFIO type1\n"
    "  iommufd  assigned PCI device, iommufd\n"
    "  mdev     mediated device of a kernel driver\n"
    "  vdpa     vhost-vdpa device\n"
    "  nvme     NVMe driver inside the VMM (QEMU's nvme://)\n"
    "  vgpu     mvgpu-backend, a process of its own\n\n"
    "Exit codes:\n"
    "  0  the limits of this shell and this host are enough\n"
    "  1  something is too small; the lines that begin with 'too small' say what and the remedy\n"
    "  2  wrong usage";

using Out = std::back_insert_iterator<std::string>;

// As mvgpu-backend --pin.
const std::map<std::string, PinMode>& VgpuPins() {
  static const std::map<std::string, PinMode> pins = {
      {"mlock", PinMode::kMlock}, {"io-uring", PinMode::kIoUring}, {"none", PinMode::kNone}};
  return pins;
}

std::string DevicesText(const MemlockRequest& request) {
  std::string text;
  for (size_t i = 0; i < kDeviceKinds; ++i) {
    if (request.devices[i] == 0) continue;
    text += fmt::format(", {} {}", request.devices[i], DeviceKindName(DeviceKind(i)));
  }
  if (text.empty()) text = ", no device";
  if (request.viommu) text += ", vIOMMU";
  if (request.locked) text += ", locked";
  return text;
}

void RenderLine(Out out, std::string_view figure, std::string_view text) {
  fmt::format_to(out, "  {:>10}  {}\n", figure, text);
}

void RenderPlan(Out out, const MemlockPlan& plan) {
  fmt::format_to(out,
                 "may be counted as locked (VmLck, VmPin: of a process; user: of all its processes "
                 "together)\n");
  for (const MemlockPlan::Charge& charge : plan.charges) {
    RenderLine(out, SizeText(charge.bytes),
               fmt::format("{} {}: {}", ProcessName(charge.process), CounterName(charge.counter),
                           charge.why));
  }
  if (plan.charges.empty()) RenderLine(out, "0 bytes", "nothing locks memory");
  fmt::format_to(
      out, "RLIMIT_MEMLOCK needed (the kernel compares each counter with it, not their sum)\n");
  for (const MemlockPlan::Limit& limit : plan.limits) {
    RenderLine(out, SizeText(limit.bytes),
               fmt::format("{}{}: {}", ProcessName(limit.process),
                           limit.processes > 1 ? fmt::format(", each of {}", limit.processes) : "",
                           limit.why));
  }
  if (plan.limits.empty()) RenderLine(out, "0 bytes", "any limit will do");
  fmt::format_to(out, "in comparison\n");
  RenderLine(out, SizeText(plan.shared.bytes.value_or(0)), "shared: " + plan.shared.why);
  RenderLine(out, plan.libvirt.bytes ? SizeText(*plan.libvirt.bytes) : "unlimited",
             "libvirt since 8.7.0: " + plan.libvirt.why);
  RenderLine(out, SizeText(plan.hot_plug.bytes.value_or(0)), plan.hot_plug.why);
}

void RenderHost(Out out, const HostLimits& host) {
  fmt::format_to(out, "here (limits of this process and of this host)\n");
  for (const HostLimits::Check& check : host.checks) {
    RenderLine(out, check.enough ? "enough" : "too small", check.message);
  }
  if (host.has_ipc_lock) {
    RenderLine(out, "note", "this process has CAP_IPC_LOCK: only vdpa is held to the limit here");
  }
}

void RenderSnippet(Out out, std::string_view title, const std::string& snippet) {
  fmt::format_to(out, "{}\n", title);
  std::istringstream lines(snippet);
  for (std::string line; std::getline(lines, line);) fmt::format_to(out, "  {}\n", line);
}

}  // namespace

CLI::App* PreflightOptions::add_to(CLI::App& app) {
  CLI::App* const verb =
      app.add_subcommand("preflight", "Say what limit of locked memory a VM will need");
  verb->footer(kFooter);
  AddSize(*verb, "--memory", request.memory_bytes, "the guest's memory, e.g. 8G");
  verb->get_option("--memory")->required();
  verb->add_option("--device", devices, "a device, or several of a kind; may be given again")
      ->allow_extra_args(false)
      ->type_name("KIND[=COUNT]");
  verb->add_flag("--viommu", request.viommu, "the guest has a virtual IOMMU");
  verb->add_flag("--locked", request.locked,
                 "the VMM locks its memory (QEMU -overcommit mem-lock=on, libvirt <locked/>)");
  verb->add_flag("--iommufd-per-process", request.iommufd_per_process,
                 "iommufd counts per process (IOMMU_OPTION_RLIMIT_MODE), not per user");
  AddSize(*verb, "--vgpu-pin-limit", request.vgpu_pin_limit_bytes,
          "--pin-limit of each vgpu (default: no limit)");
  AddChoice<PinMode>(*verb, "--vgpu-pin", request.vgpu_pin, VgpuPins(),
                     "--pin of each vgpu: mlock, io-uring, none (default: mlock)");
  verb->add_flag("--json", json, "one JSON object instead of text");
  return verb;
}

int Preflight(PreflightOptions options) {
  for (const std::string& device : options.devices) {
    if (auto added = options.request.add_device(device); !added) {
      return Complain(kAuditUsage, added.error().message());
    }
  }
  if (auto checked = options.request.check(); !checked) {
    return Complain(kAuditUsage, checked.error().message());
  }
  PreflightReport report;
  report.request = options.request;
  report.plan = PlanMemlock(report.request);
  report.host = CheckHost(report.request, report.plan);
  report.snippets = MakeSnippets(report.request, report.plan);
  const int printed = Print(options.json ? ToJson(report).dump(2) + "\n" : RenderText(report));
  if (printed != kAuditOk) return printed;
  return report.host.enough() ? kAuditOk : kAuditProblem;
}

std::string RenderText(const PreflightReport& report) {
  std::string text = fmt::format("{} of memory{}\n", SizeText(report.request.memory_bytes),
                                 DevicesText(report.request));
  const Out out = std::back_inserter(text);
  RenderPlan(out, report.plan);
  RenderHost(out, report.host);
  RenderSnippet(out, "systemd", report.snippets.systemd);
  RenderSnippet(out, "libvirt", report.snippets.libvirt);
  RenderSnippet(out, "KubeVirt", report.snippets.kubevirt);
  return text;
}

namespace {

std::string VgpuPinName(PinMode pin) {
  for (const auto& [name, mode] : VgpuPins()) {
    if (mode == pin) return name;
  }
  return "none";
}

nlohmann::json Number(std::optional<uint64_t> number) {
  return number ? nlohmann::json(*number) : nlohmann::json(nullptr);
}

nlohmann::json FigureJson(const MemlockPlan::Figure& figure) {
  return {{"bytes", Number(figure.bytes)}, {"why", figure.why}};
}

nlohmann::json HostJson(const HostLimits& host) {
  nlohmann::json checks = nlohmann::json::array();
  for (const HostLimits::Check& check : host.checks) {
    checks.push_back({{"what", check.what},
                      {"current", Number(check.current)},
                      {"needed", check.needed},
                      {"enough", check.enough},
                      {"message", check.message}});
  }
  return {{"enough", host.enough()},
          {"has_ipc_lock", host.has_ipc_lock},
          {"checks", std::move(checks)}};
}

}  // namespace

nlohmann::json ToJson(const PreflightReport& report) {
  nlohmann::json devices = nlohmann::json::object();
  for (size_t i = 0; i < kDeviceKinds; ++i) {
    devices[std::string(DeviceKindName(DeviceKind(i)))] = report.request.devices[i];
  }
  nlohmann::json charges = nlohmann::json::array();
  for (const MemlockPlan::Charge& charge : report.plan.charges) {
    charges.push_back({{"process", ProcessName(charge.process)},
                       {"counter", CounterName(charge.counter)},
                       {"bytes", charge.bytes},
                       {"why", charge.why}});
  }
  nlohmann::json limits = nlohmann::json::array();
  for (const MemlockPlan::Limit& limit : report.plan.limits) {
    limits.push_back({{"process", ProcessName(limit.process)},
                      {"processes", limit.processes},
                      {"bytes", limit.bytes},
                      {"why", limit.why}});
  }
  return {{"memory_bytes", report.request.memory_bytes},
          {"devices", std::move(devices)},
          {"viommu", report.request.viommu},
          {"locked", report.request.locked},
          {"iommufd_per_process", report.request.iommufd_per_process},
          {"vgpu_pin", VgpuPinName(report.request.vgpu_pin)},
          {"vgpu_pin_limit_bytes", Number(report.request.vgpu_pin_limit_bytes)},
          {"charges", std::move(charges)},
          {"limits", std::move(limits)},
          {"shared", FigureJson(report.plan.shared)},
          {"libvirt", FigureJson(report.plan.libvirt)},
          {"hot_plug", FigureJson(report.plan.hot_plug)},
          {"host", HostJson(report.host)},
          {"snippets",
           {{"systemd", report.snippets.systemd},
            {"libvirt", report.snippets.libvirt},
            {"kubevirt", report.snippets.kubevirt}}}};
}

}  // namespace mvgpu::backend
