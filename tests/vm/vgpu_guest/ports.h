#pragma once

// The PC's ports and its first PCI bus, for a program without an operating system.

#include <stdint.h>

namespace mvgpu::bare {

inline void Out8(uint16_t port, uint8_t value) {
  asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}
inline uint8_t In8(uint16_t port) {
  uint8_t value;
  asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
  return value;
}
inline void Out32(uint16_t port, uint32_t value) {
  asm volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}
inline uint32_t In32(uint16_t port) {
  uint32_t value;
  asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
  return value;
}

// Configuration space of a slot on bus 0, function 0, by mechanism 1 (PCI Local
// Bus 3.0, 3.2.2.3.2).
class PciSlot {
 public:
  explicit PciSlot(uint32_t slot) : slot_(slot) {}
  uint32_t read32(uint32_t offset) const {
    Select(offset);
    return In32(0xcfc);
  }
  uint8_t read8(uint32_t offset) const {
    return static_cast<uint8_t>(read32(offset & ~3u) >> (offset % 4 * 8));
  }
  void write32(uint32_t offset, uint32_t value) const {
    Select(offset);
    Out32(0xcfc, value);
  }
  uint32_t slot() const { return slot_; }

 private:
  void Select(uint32_t offset) const { Out32(0xcf8, 0x80000000u | slot_ << 11 | offset); }
  uint32_t slot_;
};

// The first serial port, as the firmware or the reset left it: QEMU's needs no setting up.
class Serial {
 public:
  static void Put(char c) {
    while ((In8(kBase + 5) & 0x20) == 0) {
    }
    Out8(kBase, static_cast<uint8_t>(c));
  }
  static void Put(const char* text) {
    while (*text != 0) Put(*text++);
  }
  static void PutHex(uint32_t value) {
    Put("0x");
    for (int shift = 28; shift >= 0; shift -= 4) Put("0123456789abcdef"[value >> shift & 15]);
  }
  // 0: nothing has come.
  static char Get() { return (In8(kBase + 5) & 1) == 0 ? 0 : static_cast<char>(In8(kBase)); }

 private:
  static constexpr uint16_t kBase = 0x3f8;
};

// QEMU's hot-plug registers of the i440FX board (docs/specs/acpi_pci_hotplug): slots that the VMM
// wants to take away are said in one register and let go in the next, as an operating system's ACPI
// interpreter would do. Bus 0 is selected at reset.
class SlotsToEject {
 public:
  static uint32_t Asked() { return In32(0xae04); }
  static void LetGo(uint32_t slots) { Out32(0xae08, slots); }
};

}  // namespace mvgpu::bare
