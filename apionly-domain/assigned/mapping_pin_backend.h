#pragma once

#include <memory>

#include "apionly-domain/assigned/assigned_space.h"
#include "apionly-domain/pin/pin_backend.h"

namespace mvgpu::domain {

// For a domain all of whose pins are a cache's that maps them in this space, whose IOMMU holds what
// it maps: the mapping is what holds a page, and what the kernel counts. With another back end it
// would count twice (type1, mlock), or be pinned twice.
//
// A page that is pinned and not mapped, before the one or after the other, is held by nobody. The
// device cannot reach it then, and nobody else relies on where it is.
//
// Nothing fails here: where the kernel's limit is reached, it is the mapping that does. What is
// locked changes with the mappings, after a pin and before its release, see
// ApiOnlyDomain::show_locked(). Pages at two IOVAs count twice.
//
// The space outlives the back end, REQUIRES: holds_memory(), and nobody else maps in it.
std::unique_ptr<PinBackend> MakeMappingPinBackend(const AssignedSpace* space);

}  // namespace mvgpu::domain
