#pragma once

#include "apionly-domain/accounting/ledger_memory.h"

namespace mvgpu::domain {

// The other side of `Change` (file_view.h): what makes changes of bits, which take no lock, wait
// for whoever takes a segment away with the lock held.
//
// REQUIRES of both: the ledger's lock is held, so nobody looks up where segments are meanwhile.

// From now on no change of this file's bits begins until the lock is free.
void StopChanges(LedgerMemory& memory, unsigned file);

// After StopChanges(): waits until every change that had begun has finished or its process is dead.
// False when one did not finish for 100 ms, because its process is stopped: the segments that it
// knows must stay then.
bool ChangesFinished(LedgerMemory& memory);

}  // namespace mvgpu::domain
