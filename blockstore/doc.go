// Package blockstore keeps lazyvol's data in object storage.
//
// A [Store] is a bucket and prefix, or a directory, seen as a flat space of
// immutable-by-convention objects under string keys, with the two conditional
// writes that lazyvol's coordination rests on: create only if absent, and
// replace only if unchanged. [NewS3], [NewDir] and [NewMem] are three of them,
// held to the same promises by the suite in blockstoretest; [Open] picks one by
// URL. [Retry] and [Limit] are decorators over any store, and [Probe] proves
// that a server honours the conditions before anything relies on it.
//
// A pack is one object of about [PackTarget] bytes: the blocks one snapshot
// uploaded, each in a numbered slot, behind a slot table that says where each
// slot's bytes lie. [PackBuilder] makes packs, [BlockReader] reads runs of
// blocks out of them and verifies every byte, and [RewritePack] drops a pack's
// dead slots without changing the numbers of the live ones.
package blockstore
