#include "vmm-glue/vfio_user/version.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "apionly-domain/base/check.h"

namespace mvgpu::glue::vfio_user {

namespace {

using Json = nlohmann::json;

constexpr size_t kMaxVersionJson = 16 * 1024;  // real clients send up to 194 bytes
constexpr size_t kQemuVersionReplyMax = 214;
constexpr uint64_t kMaxClientFds = 1024;
constexpr uint64_t kSmallestPage = 4096;

// The text in front of the NUL that must be there. Nothing else says where the JSON ends.
Result<std::string_view> JsonText(std::span<const std::byte> bytes) {
  if (bytes.size() > kMaxVersionJson) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("version JSON has {} bytes, at most {} are allowed", bytes.size(),
                            kMaxVersionJson));
  }
  if (bytes.back() != std::byte{0}) {
    return Fail(ErrorCode::kInvalid, "version JSON does not end in a NUL");
  }
  const auto* text = reinterpret_cast<const char*>(bytes.data());
  return std::string_view(text, strnlen(text, bytes.size()));
}

// Leaves `value` alone when the key is absent.
Result<void> ReadNumber(const Json& object, const char* key, uint64_t min, uint64_t max,
                        uint64_t& value) {
  const auto it = object.find(key);
  if (it == object.end()) return {};
  if (!it->is_number_unsigned()) {
    return Fail(ErrorCode::kInvalid, fmt::format("capability {} is not a whole number", key));
  }
  const auto number = it->get<uint64_t>();
  if (number < min || number > max) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("capability {} is {}, allowed are {} to {}", key, number, min, max));
  }
  value = number;
  return {};
}

Result<void> ReadBool(const Json& object, const char* key, bool& value) {
  const auto it = object.find(key);
  if (it == object.end()) return {};
  if (!it->is_boolean()) {
    return Fail(ErrorCode::kInvalid, fmt::format("capability {} is neither true nor false", key));
  }
  value = it->get<bool>();
  return {};
}

// The object under a key; null when the key is absent.
Result<const Json*> FindObject(const Json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end()) return nullptr;
  if (!it->is_object()) return Fail(ErrorCode::kInvalid, fmt::format("{} is not an object", key));
  return &*it;
}

// Migration is not ours to do, but a client that talks nonsense about it is better refused now.
Result<void> CheckMigration(const Json& capabilities) {
  MVGPU_ASSIGN_OR_RETURN(const Json* migration, FindObject(capabilities, "migration"));
  if (migration == nullptr) return {};
  uint64_t page_size = kSmallestPage;
  uint64_t max_bitmap_size = 0;
  MVGPU_RETURN_IF_ERROR(ReadNumber(*migration, "pgsize", kSmallestPage, UINT64_MAX, page_size));
  MVGPU_RETURN_IF_ERROR(ReadNumber(*migration, "max_bitmap_size", 0, UINT64_MAX, max_bitmap_size));
  if (page_size % kSmallestPage != 0) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("migration pgsize is {}, no multiple of {}", page_size, kSmallestPage));
  }
  return {};
}

Result<void> ReadCapabilities(const Json& capabilities, ClientVersion& client) {
  uint64_t ignored = 0;
  MVGPU_RETURN_IF_ERROR(
      ReadNumber(capabilities, "max_msg_fds", 0, kMaxClientFds, client.max_msg_fds));
  MVGPU_RETURN_IF_ERROR(
      ReadNumber(capabilities, "max_data_xfer_size", 0, UINT64_MAX, client.max_data_xfer_size));
  MVGPU_RETURN_IF_ERROR(ReadNumber(capabilities, "max_dma_maps", 0, UINT64_MAX, ignored));
  MVGPU_RETURN_IF_ERROR(ReadNumber(capabilities, "pgsizes", 0, UINT64_MAX, ignored));
  MVGPU_RETURN_IF_ERROR(ReadBool(capabilities, "write_multiple", client.write_multiple));
  MVGPU_RETURN_IF_ERROR(FindObject(capabilities, "twin_socket"));
  return CheckMigration(capabilities);
}

}  // namespace

Result<ClientVersion> ParseClientVersion(std::span<const std::byte> payload) {
  MVGPU_ASSIGN_OR_RETURN(const Version version, ReadStruct<Version>(payload));
  if (version.major != kVersionMajor) {
    return Fail(ErrorCode::kInvalid,
                fmt::format("client speaks version {}.{}, this server {}.{}", version.major,
                            version.minor, kVersionMajor, kVersionMinor));
  }
  ClientVersion client;
  client.minor = version.minor;
  const auto rest = payload.subspan(sizeof(Version));
  if (rest.empty()) return client;

  MVGPU_ASSIGN_OR_RETURN(const std::string_view text, JsonText(rest));
  const Json root = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (root.is_discarded()) return Fail(ErrorCode::kInvalid, "version JSON does not parse");
  if (!root.is_object()) return Fail(ErrorCode::kInvalid, "version JSON is not an object");
  MVGPU_ASSIGN_OR_RETURN(const Json* capabilities, FindObject(root, "capabilities"));
  if (capabilities != nullptr) MVGPU_RETURN_IF_ERROR(ReadCapabilities(*capabilities, client));
  return client;
}

void AppendServerVersion(const ClientVersion& client, Payload& reply) {
  // A reply must not exceed the client's minor version: QEMU proposes 0.0, everybody else 0.1.
  AppendStruct(reply, Version{kVersionMajor, std::min(client.minor, kVersionMinor)});
  const std::string text =
      fmt::format(R"({{"capabilities":{{"max_msg_fds":{},"max_data_xfer_size":{},"pgsizes":{},)"
                  R"("max_dma_maps":{}{}}}}})",
                  kMaxMessageFds, kMaxTransfer, kSmallestPage, kMaxDmaMaps,
                  client.write_multiple ? R"(,"write_multiple":true)" : "");
  const auto bytes = std::as_bytes(std::span(text.c_str(), text.size() + 1));
  reply.insert(reply.end(), bytes.begin(), bytes.end());
  MVGPU_CHECK(sizeof(Header) + reply.size() <= kQemuVersionReplyMax);
}

}  // namespace mvgpu::glue::vfio_user
