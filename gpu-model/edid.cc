#include "gpu-model/edid.h"

#include <fmt/format.h>
#include <libxcvt/libxcvt.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <span>
#include <string_view>

#include "apionly-domain/base/check.h"

namespace mvgpu::gpu {

namespace {

constexpr size_t kBlockSize = 128;
constexpr size_t kDescriptorSize = 18;
constexpr Size kSmallestMode{640, 480};
constexpr uint32_t kLargestInTiming = 4095;  // 12 bits for each dimension
constexpr uint32_t kLargestClock = 0xffff;   // 16 bits, units of 10 kHz
constexpr float kRefreshHz = 60;

using Bytes = std::span<std::byte>;

void Put(Bytes bytes, size_t offset, uint64_t value) {
  MVGPU_DCHECK(value <= 0xff);
  bytes[offset] = static_cast<std::byte>(value);
}
void PutAll(Bytes bytes, size_t offset, std::initializer_list<uint8_t> values) {
  for (const uint8_t value : values) bytes[offset++] = std::byte{value};
}

// A well-known mode at 60 Hz: how the EDID says it, and what it asks of the monitor.
struct KnownMode {
  Size size;
  uint32_t line_khz;        // horizontal frequency, rounded up
  uint32_t clock_mhz;       // rounded up
  uint8_t established = 0;  // base block byte 35 or 36
  uint8_t bit = 0;
};

constexpr KnownMode kKnownModes[] = {
    {.size = {640, 480}, .line_khz = 32, .clock_mhz = 26, .established = 35, .bit = 5},
    {.size = {800, 600}, .line_khz = 38, .clock_mhz = 40, .established = 35, .bit = 0},
    {.size = {1024, 768}, .line_khz = 49, .clock_mhz = 65, .established = 36, .bit = 3},
    // Standard timings: at most eight.
    {.size = {1280, 720}, .line_khz = 45, .clock_mhz = 75},
    {.size = {1280, 800}, .line_khz = 50, .clock_mhz = 84},
    {.size = {1280, 1024}, .line_khz = 64, .clock_mhz = 108},
    {.size = {1440, 900}, .line_khz = 56, .clock_mhz = 107},
    {.size = {1600, 900}, .line_khz = 60, .clock_mhz = 108},
    {.size = {1680, 1050}, .line_khz = 66, .clock_mhz = 147},
    {.size = {1920, 1080}, .line_khz = 68, .clock_mhz = 149},
    {.size = {1920, 1200}, .line_khz = 75, .clock_mhz = 194},
};

bool Fits(Size size, Size largest) {
  return size.width <= largest.width && size.height <= largest.height;
}

// The limits of the monitor: they grow with the modes that it offers.
struct Limits {
  uint32_t line_khz = 50;
  uint32_t clock_mhz = 70;
  void include(uint32_t khz, uint32_t mhz) {
    line_khz = std::max(line_khz, khz);
    clock_mhz = std::max(clock_mhz, mhz);
  }
};

// One detailed timing, in pixels and lines.
struct Timing {
  Size active;
  uint32_t clock_10khz = 0;
  uint32_t h_blank = 0, h_front = 0, h_sync = 0;
  uint32_t v_blank = 0, v_front = 0, v_sync = 0;

  uint32_t line_khz() const { return clock_10khz * 10 / (active.width + h_blank) + 1; }
  uint32_t clock_mhz() const { return clock_10khz / 100 + 1; }
};

// libxcvt rounds the width down to a multiple of eight; the timing gets the wanted width and CVT's
// blanking, which with reduced blanking does not depend on the width.
Timing MakeTiming(Size size) {
  const std::unique_ptr<libxcvt_mode_info, decltype(&std::free)> mode(
      libxcvt_gen_mode_info(static_cast<int>(size.width), static_cast<int>(size.height), kRefreshHz,
                            /*reduced=*/true, /*interlaced=*/false),
      &std::free);
  MVGPU_CHECK(mode != nullptr);  // null only without memory
  Timing timing;
  timing.active = size;
  timing.clock_10khz = static_cast<uint32_t>((mode->dot_clock + 5) / 10);
  timing.h_blank = mode->htotal - mode->hdisplay;
  timing.h_front = mode->hsync_start - mode->hdisplay;
  timing.h_sync = static_cast<uint32_t>(mode->hsync_end - mode->hsync_start);
  timing.v_blank = mode->vtotal - mode->vdisplay;
  timing.v_front = mode->vsync_start - mode->vdisplay;
  timing.v_sync = static_cast<uint32_t>(mode->vsync_end - mode->vsync_start);
  return timing;
}

// At 96 pixels per inch, as desktops assume.
Size Millimetres(Size pixels) { return {pixels.width * 254 / 960, pixels.height * 254 / 960}; }

// E-EDID 1.4, 3.10.2
void WriteTiming(Bytes to, const Timing& t, Size mm) {
  const auto high_nibbles = [](uint32_t a, uint32_t b) { return ((a >> 8) << 4) | (b >> 8); };
  Put(to, 0, t.clock_10khz & 0xff);
  Put(to, 1, t.clock_10khz >> 8);
  Put(to, 2, t.active.width & 0xff);
  Put(to, 3, t.h_blank & 0xff);
  Put(to, 4, high_nibbles(t.active.width, t.h_blank));
  Put(to, 5, t.active.height & 0xff);
  Put(to, 6, t.v_blank & 0xff);
  Put(to, 7, high_nibbles(t.active.height, t.v_blank));
  Put(to, 8, t.h_front & 0xff);
  Put(to, 9, t.h_sync & 0xff);
  Put(to, 10, ((t.v_front & 0xf) << 4) | (t.v_sync & 0xf));
  Put(to, 11,
      ((t.h_front >> 8) << 6) | ((t.h_sync >> 8) << 4) | ((t.v_front >> 4) << 2) | (t.v_sync >> 4));
  Put(to, 12, mm.width & 0xff);
  Put(to, 13, mm.height & 0xff);
  Put(to, 14, high_nibbles(mm.width, mm.height));
  Put(to, 17, 0x1a);  // separate digital syncs, horizontal positive, vertical negative: CVT reduced
                      // blanking
}

// E-EDID 1.4, 3.10.3: a descriptor of 13 characters, ended by a line feed and padded with spaces.
void WriteText(Bytes to, uint8_t tag, std::string_view text) {
  PutAll(to, 0, {0, 0, 0, tag, 0});
  text = text.substr(0, 13);
  for (size_t i = 0; i < 13; ++i) {
    Put(to, 5 + i, i < text.size() ? static_cast<uint8_t>(text[i]) : i == text.size() ? '\n' : ' ');
  }
}

void WriteLimits(Bytes to, const Limits& limits) {
  PutAll(to, 0, {0, 0, 0, 0xfd, 0});
  PutAll(to, 5, {50, 75, 25});  // Hz from and to, kHz from
  Put(to, 8, limits.line_khz);
  Put(to, 9, (limits.clock_mhz + 9) / 10);
  PutAll(to, 10, {0x01, '\n', ' ', ' ', ' ', ' ', ' ', ' '});  // range limits only
}

// E-EDID 1.4, 3.9; aspect ratio in the top bits of the second byte, 60 Hz in the others.
void WriteStandardTiming(Bytes edid, size_t slot, Size size) {
  uint8_t aspect = 0;  // 16:10
  if (size.width * 3 == size.height * 4) aspect = 1;
  if (size.width * 4 == size.height * 5) aspect = 2;
  if (size.width * 9 == size.height * 16) aspect = 3;
  Put(edid, 38 + 2 * slot, size.width / 8 - 31);
  Put(edid, 39 + 2 * slot, uint64_t{aspect} << 6);
}

void WriteChecksum(Bytes block) {
  uint32_t sum = 0;
  for (size_t i = 0; i + 1 < kBlockSize; ++i) sum += static_cast<uint8_t>(block[i]);
  Put(block, kBlockSize - 1, (0x100 - (sum & 0xff)) & 0xff);
}

// E-EDID 1.4, 3.3 to 3.7: who we are and what the colours are.
void WriteIdentity(Bytes edid, Size mm) {
  PutAll(edid, 0, {0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00});
  PutAll(edid, 8, {0x36, 0xc7});               // "MVG", five bits a letter
  PutAll(edid, 10, {0x01, 0x00, 0, 0, 0, 0});  // product 1; the serial number is a string
  PutAll(edid, 16, {0xff, 2024 - 1990});       // model year
  PutAll(edid, 18, {1, 4});
  Put(edid, 20, 0xa5);  // digital, 8 bits per colour, DisplayPort
  Put(edid, 21, std::min(255u, (mm.width + 5) / 10));
  Put(edid, 22, std::min(255u, (mm.height + 5) / 10));
  Put(edid, 23, 220 - 100);  // gamma 2.2
  Put(edid, 24, 0x06);       // sRGB; the first detailed timing is native and preferred
  PutAll(edid, 25, {0xee, 0x91, 0xa3, 0x54, 0x4c, 0x99, 0x26, 0x0f, 0x50, 0x54});  // sRGB primaries
}

// CTA-861: the modes that the base block has no room for, as detailed timings. No video data block:
// its first code would be preferred over the first detailed timing.
void WriteExtension(Bytes block, Size mm, Size largest, Limits* limits) {
  size_t at = 7;
  PutAll(block, 0,
         {0x02, 0x03, static_cast<uint8_t>(at), 0x80});  // nothing is hidden behind a frame
  PutAll(block, 4, {0xe2, 0x00, 0x4a});  // video capabilities: RGB range selectable, underscanned
  for (const Size size : {Size{2560, 1440}, Size{2560, 1600}, Size{3840, 2160}}) {
    if (!Fits(size, largest)) continue;
    const Timing timing = MakeTiming(size);
    WriteTiming(block.subspan(at, kDescriptorSize), timing, mm);
    limits->include(timing.line_khz(), timing.clock_mhz());
    at += kDescriptorSize;
  }
  WriteChecksum(block);
}

void WriteKnownModes(Bytes edid, Size largest, Limits* limits) {
  size_t slot = 0;
  for (const KnownMode& mode : kKnownModes) {
    if (!Fits(mode.size, largest)) continue;
    limits->include(mode.line_khz, mode.clock_mhz);
    if (mode.established != 0) {
      edid[mode.established] |= std::byte{1} << mode.bit;
    } else {
      WriteStandardTiming(edid, slot++, mode.size);
    }
  }
  for (; slot < 8; ++slot) PutAll(edid, 38 + 2 * slot, {0x01, 0x01});
}

}  // namespace

Result<void> CheckPreferredMode(Size preferred, Size largest) {
  if (!Fits(kSmallestMode, largest)) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("largest mode {}x{}; choose at least {}x{}", largest.width,
                            largest.height, kSmallestMode.width, kSmallestMode.height));
  }
  const Size limit{std::min(largest.width, kLargestInTiming),
                   std::min(largest.height, kLargestInTiming)};
  if (!Fits(kSmallestMode, preferred) || !Fits(preferred, limit)) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("preferred mode {}x{}; choose one from {}x{} to {}x{}", preferred.width,
                            preferred.height, kSmallestMode.width, kSmallestMode.height,
                            limit.width, limit.height));
  }
  const Timing timing = MakeTiming(preferred);
  if (timing.clock_10khz > kLargestClock || timing.line_khz() > 255) {
    return Fail(
        ErrorCode::kInvalid,
        fmt::format(
            "preferred mode {}x{} needs a pixel clock of {} MHz and lines at {} kHz, an edid "
            "has room for 655 and 255; choose a smaller one",
            preferred.width, preferred.height, timing.clock_mhz(), timing.line_khz()));
  }
  return {};
}

EdidBlob MakeEdid(const EdidInfo& info) {
  EdidBlob blob{};
  const Bytes base = Bytes(blob).first(kBlockSize);
  const Timing preferred = MakeTiming(info.preferred);
  Limits limits;
  limits.include(preferred.line_khz(), preferred.clock_mhz());

  const Size mm = Millimetres(info.preferred);
  WriteIdentity(base, mm);
  WriteKnownModes(base, info.largest, &limits);
  WriteExtension(Bytes(blob).subspan(kBlockSize), mm, info.largest, &limits);
  const auto descriptor = [base](size_t n) {
    return base.subspan(54 + n * kDescriptorSize, kDescriptorSize);
  };
  WriteTiming(descriptor(0), preferred, mm);
  WriteLimits(descriptor(1), limits);
  WriteText(descriptor(2), 0xfc, info.name);
  WriteText(descriptor(3), 0xff, info.serial);
  Put(base, 126, 1);  // extensions
  WriteChecksum(base);
  return blob;
}

}  // namespace mvgpu::gpu
