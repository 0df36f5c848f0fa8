#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "apionly-domain/base/error.h"
#include "vmm-glue/vfio_user/message.h"
#include "vmm-glue/vfio_user/protocol.h"

namespace mvgpu::glue::vfio_user {

// What a client says of itself in its first message. Absent capabilities have the protocol's
// defaults.
struct ClientVersion {
  uint16_t minor = 0;
  uint64_t max_msg_fds = 1;
  uint64_t max_data_xfer_size = kMaxTransfer;
  bool write_multiple = false;
};

// The payload of a VERSION command: a Version, then perhaps JSON that ends in a NUL. kInvalid for
// another major version, JSON that does not parse, and known capabilities of a wrong type or value.
// Capabilities that we do not know are ignored, as the protocol demands.
Result<ClientVersion> ParseClientVersion(std::span<const std::byte> payload);

// The payload of the reply. QEMU reads a reply into the buffer of its request, so that this one
// stays within 214 bytes, header included. write_multiple is named only to a client that knows it;
// twin_socket never: of the clients that map memory without a descriptor, none knows it.
void AppendServerVersion(const ClientVersion& client, Payload& reply);

}  // namespace mvgpu::glue::vfio_user
