#pragma once

#include <absl/container/flat_hash_map.h>

#include <cstdint>
#include <memory>

#include "apionly-domain/accounting/file_view.h"
#include "apionly-domain/accounting/ledger_store.h"
#include "apionly-domain/base/address.h"
#include "apionly-domain/base/error.h"
#include "apionly-domain/memory/guest_file.h"

namespace mvgpu::domain {

// Holds and releases of one row, without the ledger's lock as long as there is room for the bits:
// an atomic exchange that announces the change, then some loads and stores for each word of 64
// pages (word_protocol.h). The lock is taken to make room, and when the layout of the file's
// segments has changed.
//
// The members are this process's memory of what it knows about the file; nothing in the ledger
// depends on it. Not thread-safe: one call at a time.
class RowHolds {
 public:
  // The store must outlive this. REQUIRES: the row was just added.
  RowHolds(LedgerStore& store, LedgerStore::RowId id)
      : store_(store), id_(id), record_(store.row(id.index)) {}
  RowHolds(const RowHolds&) = delete;
  RowHolds& operator=(const RowHolds&) = delete;

  // As LedgerRow::hold() and release().
  [[gnu::hot]] Result<void> hold(const FileIdentity& file, uint64_t file_pages, PageRun pages);
  [[gnu::hot]] void release(const FileIdentity& file, PageRun pages);

 private:
  class Sharing;
  struct Word;
  struct Words;

  FileView& view_of(const FileIdentity& file) {
    return last_view_ != nullptr && last_file_ == file ? *last_view_ : FindView(file);
  }
  FileView& FindView(const FileIdentity& file);
  FileView* WindowOn(const FileIdentity& file, PageRun pages);
  // What most changes are: pages of one word, or of two beside each other, and one neighbour at
  // most. False, and nothing has changed: it is not that simple.
  bool HoldQuickly(const FileIdentity& file, uint64_t file_pages, PageRun pages);
  bool ReleaseQuickly(const FileIdentity& file, PageRun pages);
  // Any pages.
  [[gnu::noinline]] Result<void> HoldRun(const FileIdentity& file, uint64_t file_pages,
                                         PageRun pages);
  [[gnu::noinline]] void ReleaseRun(const FileIdentity& file, PageRun pages);
  Result<void> HoldSlowly(const FileIdentity& file, uint64_t file_pages, PageRun pages,
                          uint64_t next);
  // Both do their work up to the page that is returned: pages.end(), or one where it cannot go on
  // by what `view` says. REQUIRES: a change is announced.
  uint64_t HoldBy(FileView& view, PageRun pages);
  uint64_t ReleaseBy(const FileView& view, PageRun pages);
  // Whether a change by what `view` says may begin.
  bool is_known(const FileView& view) const {
    return view.layout != 0 && ledger_format::LoadWord(record_.token) == id_.token;
  }

  LedgerStore& store_;
  const LedgerStore::RowId id_;
  ledger_format::RowRecord& record_;
  // Our own copies: what others write into the file does not change them.
  uint64_t changes_ = 0;
  uint64_t held_pages_ = 0;
  uint64_t released_pages_ = 0;
  absl::flat_hash_map<FileIdentity, std::unique_ptr<FileView>> views_;
  FileIdentity last_file_;         // whose view that is:
  FileView* last_view_ = nullptr;  // in views_; null: none yet
};

}  // namespace mvgpu::domain
