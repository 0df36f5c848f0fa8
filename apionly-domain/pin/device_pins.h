#pragma once

// Which pages of guest memory the IOMMUs of assigned devices hold in this process, and who is told.
//
// The kernel counts a page that a pin back end locks and VFIO type1 maps twice (VmLck), and neither
// looks at the other. So who holds pages by a back end gives the lock up while a device's mapping
// holds them, and has it back before the last such mapping goes: at no instant is a page that
// somebody holds without either.
//
//   add()      after a mapping holds the pages: sharers give their locks up
//   remove()   before a mapping goes: if it was the last one, sharers take their locks first, and
//              the mapping has to stay when one cannot

#include <cstdint>
#include <vector>

#include <absl/container/flat_hash_map.h>

#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/base/mutex.h"
#include "apionly-domain/memory/guest_file.h"
#include "apionly-domain/pin/run_counter.h"

namespace mvgpu::domain {

// Thread-safe. Lock order: a container's change lock, this one, a sharer's (a domain's pin lock).
class DevicePins {
 public:
  // Who holds pages by a pin back end. Called one at a time, each page in turn held and let go.
  class Sharer {
   public:
    virtual ~Sharer() = default;
    // A device's mapping holds the pages from now on.
    virtual void on_device_holds(const FileIdentity& file, PageRun pages) = 0;
    // None will any more when this has succeeded; until it returns one does. Errors: those of
    // PinBackend::pin(); nothing has changed then.
    virtual Result<void> on_device_leaves(const FileIdentity& file, PageRun pages) = 0;
  };

  // REQUIRES: everything was removed, every sharer has left.
  ~DevicePins();

  // The sharer hears of what is held already. It must leave before it goes.
  void join(Sharer* sharer);
  void leave(Sharer* sharer);

  // One more mapping holds the pages.
  void add(const FileIdentity& file, PageRun pages);
  // One less will. Errors: what a sharer answered; the mapping must stay, and is counted as before.
  // REQUIRES: added before, as a whole or in any cut.
  Result<void> remove(const FileIdentity& file, PageRun pages);

  // Pages that mappings hold, each once.
  uint64_t unique_pages() const;

 private:
  using Runs = std::vector<PageRun>;

  // All sharers, or none and what the one that could not answered.
  Result<void> TellLeavingLocked(const FileIdentity& file, const Runs& runs)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable Mutex mutex_;
  std::vector<Sharer*> sharers_ ABSL_GUARDED_BY(mutex_);
  // How many mappings hold each page. Without files of which none is held.
  absl::flat_hash_map<FileIdentity, RunCounter> held_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace mvgpu::domain
