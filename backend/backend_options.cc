#include "backend/backend_options.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <fstream>
#include <map>
#include <optional>
#include <utility>

#include <nlohmann/json.hpp>

#include "backend/cli_options.h"

namespace mvgpu::backend {

namespace {

constexpr std::string_view kFooter = R"(
Attach it to QEMU >= 10.1 (give the guest shared memory):
  qemu-system-x86_64 -machine q35,memory-backend=m -object memory-backend-memfd,id=m,size=2G,share=on \
    -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"PATH"}}'
or to Cloud Hypervisor:
  cloud-hypervisor --memory size=2G,shared=on --user-device socket=PATH

Signals: SIGUSR1 writes the screenshot, SIGTERM and SIGINT leave at once and clean.
Exit codes: 0 left as asked, 1 failure, 2 command line, 3 the socket cannot be used.)";

void PrintCapabilities() {
  nlohmann::json pins = nlohmann::json::array();
  for (const auto& [name, mode] : PinModes()) pins.push_back(name);
  nlohmann::json mappers = nlohmann::json::array();
  for (const auto& [name, mode] : DmaModes()) mappers.push_back(name);
  const nlohmann::json capabilities = {
      {"type", "gpu"},          {"protocol", "vfio-user"},   {"features", {"edid"}},
      {"pin", std::move(pins)}, {"dma", std::move(mappers)},
  };
  fmt::print("{}\n", capabilities.dump(2));
}

// A random UUID for a VM that was not named.
std::string RandomUuid() {
  std::ifstream file("/proc/sys/kernel/random/uuid");
  std::string uuid;
  file >> uuid;
  return uuid;
}

// systemd's socket activation (sd_listen_fds(3)): descriptor 3, when it was meant for this process.
int SystemdSocket() {
  const char* pid = std::getenv("LISTEN_PID");
  const char* count = std::getenv("LISTEN_FDS");
  if (pid == nullptr || count == nullptr || std::atol(pid) != getpid() || std::atoi(count) < 1)
    return -1;
  return 3;
}

}  // namespace

tl::expected<BackendOptions, ExitCode> ParseCommandLine(int argc, const char* const* argv) {
  BackendOptions options;
  VgpuConfig& vgpu = options.session.vgpu;
  CLI::App app(
      "A vGPU for one VM, in a process of its own. A VMM connects to it over vfio-user; the guest "
      "sees a PCI virtio-gpu.",
      "mvgpu-backend");
  app.set_version_flag("--version", MVGPU_VERSION);
  bool print_capabilities = false;
  app.add_flag("--print-capabilities", print_capabilities, "Print one JSON object and leave");
  auto* path =
      app.add_option("--socket-path", options.socket_path, "UNIX socket to listen on (mode 0600)");
  auto* fd =
      app.add_option("--fd", options.socket_fd, "Descriptor of a listening or connected socket")
          ->check(CLI::NonNegativeNumber);
  path->excludes(fd);
  app.add_option("--vm-uuid", vgpu.vm_uuid,
                 "The VM whose accounts this vGPU joins (default: a random one)");
  app.add_option("--name", vgpu.name, "The vGPU's name in accounts and messages")
      ->capture_default_str();
  app.add_option("--runtime-dir", vgpu.runtime_dir,
                 "Where the accounts are kept (default: /run/mvgpu, or $XDG_RUNTIME_DIR/mvgpu)");
  AddChoice<PinMode>(app, "--pin", vgpu.pin, PinModes(),
                     "How pages are held while the device uses them: mlock, io-uring, none "
                     "(default: mlock)");
  std::optional<uint64_t> pin_limit;
  AddSize(app, "--pin-limit", pin_limit,
          "Most memory to pin at a time, e.g. 64M (default: no limit)");
  AddDmaOptions(app, vgpu);
  std::optional<uint64_t> dma_idle;
  AddIdleOption(app, dma_idle, "0");
  app.add_option("--screenshot", options.session.screenshot_path,
                 "What the guest shows, as PNG, on SIGUSR1 and when the VMM leaves");
  app.add_option("--record", options.session.record_path,
                 "Write a trace for mvgpu-replay; it holds guest memory");
  app.add_flag("--once", options.once, "Leave after the first VM instead of listening again");
  app.footer(std::string(kFooter));

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {  // --help, --version
      app.exit(error);
      return tl::unexpected(ExitCode::kOk);
    }
    fmt::print(stderr, "mvgpu-backend: {}; see --help\n", error.what());
    return tl::unexpected(ExitCode::kUsage);
  }
  if (print_capabilities) {
    PrintCapabilities();
    return tl::unexpected(ExitCode::kOk);
  }
  if (options.socket_path.empty() && options.socket_fd < 0) options.socket_fd = SystemdSocket();
  if (options.socket_path.empty() && options.socket_fd < 0) {
    fmt::print(stderr, "mvgpu-backend: no socket: give --socket-path=PATH or --fd=N; see --help\n");
    return tl::unexpected(ExitCode::kUsage);
  }
  if (pin_limit && *pin_limit < kPageSize) {
    fmt::print(stderr,
               "mvgpu-backend: --pin-limit of {} bytes is less than a page; give 4K or more, or "
               "leave it out for no limit\n",
               *pin_limit);
    return tl::unexpected(ExitCode::kUsage);
  }
  vgpu.dma_idle_bytes = dma_idle.value_or(0);
  vgpu.pin_limit_bytes = pin_limit.value_or(UINT64_MAX);
  if (vgpu.vm_uuid.empty()) vgpu.vm_uuid = RandomUuid();
  return options;
}

}  // namespace mvgpu::backend
