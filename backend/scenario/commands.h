#pragma once

#include <span>

#include "backend/scenario/command.h"

namespace mvgpu::backend::scenario {

// The commands of each system, in a file of its own.
std::span<const Command> MemoryCommands();   // guest memory, mappings, pins, accounts
std::span<const Command> DmaCommands();      // the cache of device addresses, an assigned device
std::span<const Command> ZpciCommands();     // s390 PCI functions: MPCIFC and RPCIT
std::span<const Command> ViommuCommands();   // a guest's VT-d IOMMU, and who listens to it
std::span<const Command> VgpuCommands();     // a vGPU behind that, and the driver of its guest
std::span<const Command> FaultCommands();    // I/O page faults: page requests and stalls
std::span<const Command> CoiommuCommands();  // cooperative pinning

}  // namespace mvgpu::backend::scenario
