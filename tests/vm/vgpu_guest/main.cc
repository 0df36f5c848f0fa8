// A guest in 5 KiB, for a VMM that is emulated itself and has no time for an operating system:
// drives the vgpu as a driver does and obeys one letter at a time on the serial port.
//
//   a   give the picture its pages and show it      d   take them away
//
// Answers with one line each. Slots that the VMM wants to unplug it lets go at once.

#include "tests/vm/vgpu_guest/ports.h"
#include "tests/vm/vgpu_guest/virtio_gpu.h"

namespace mvgpu::bare {

namespace {

constexpr uint32_t kVirtioGpu = 0x1050'1af4;

void Say(const char* what, bool well) {
  Serial::Put("VGPU-GUEST: ");
  Serial::Put(what);
  Serial::Put(well ? "\n" : " failed\n");
}

bool StartGpu(VirtioGpu& gpu) {
  for (uint32_t slot = 0; slot < 32; ++slot) {
    const PciSlot pci(slot);
    if (pci.read32(0) == kVirtioGpu) return gpu.start(pci) && gpu.create_picture();
  }
  return false;
}

void Obey(VirtioGpu& gpu, char command) {
  if (command == 'a') Say("attached", gpu.attach() && gpu.show());
  if (command == 'd') Say("detached", gpu.detach());
}

[[noreturn]] void Serve(VirtioGpu& gpu) {
  while (true) {
    Obey(gpu, Serial::Get());
    if (const uint32_t slots = SlotsToEject::Asked()) {
      SlotsToEject::LetGo(slots);
      Serial::Put("VGPU-GUEST: let go of slots ");
      Serial::PutHex(slots);
      Serial::Put("\n");
    }
    asm volatile("pause");
  }
}

}  // namespace

}  // namespace mvgpu::bare

extern "C" [[noreturn]] void Main() {
  static mvgpu::bare::VirtioGpu gpu;
  mvgpu::bare::Say("vgpu up", mvgpu::bare::StartGpu(gpu));
  mvgpu::bare::Serve(gpu);
}
