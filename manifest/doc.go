// Package manifest holds the nouns of lazyvol's store and the codecs of everything in it that is not
// block data. It does no I/O: callers bring bytes and take bytes away.
//
// # The nouns
//
//   - A lineage ([LineageID]) is a volume, its snapshots and everything restored from them. Nothing is
//     shared between two lineages.
//   - A snapshot ([SnapshotID]) is an immutable image of a volume at one moment. Its id is its lineage
//     and a serial; inside a lineage's objects the serial alone names it.
//   - A volume ([VolumeID]) is a device on one host.
//   - [Geometry] is a device's size and how it is cut: into blocks, and blocks into leaves of
//     [LeafBlocks] each.
//   - A [Ref] says where one block's bytes lie (owner, pack, slot) and what they hash to. The zero Ref
//     is a hole: a block that is all zeros and stored nowhere.
//   - A [Leaf] is the refs of [LeafBlocks] neighbouring blocks.
//   - A [Section] is the live slots of up to [SectionPacks] packs of one owner: what reclaim needs to
//     know, without walking leaves.
//   - A [Root] is a snapshot's index: where each of its leaves lies and, as its footer, where each
//     section of live slots lies. Leaves and sections that did not change are inherited by
//     reference, so a root stands alone: there is no chain of deltas to follow.
//   - Records ([Intent], [Outcome], [Tombstone], [Pin], …) are the small JSON objects of the commit
//     protocol, and keys (keys.go) are where each thing lies in a store.
//
// The hash of a root is recorded in its snapshot's [Outcome], the root holds the hash of every leaf
// and section, and a leaf that of every block: one Merkle tree covers all of a snapshot.
//
// # Decoding
//
// The store is not trusted. Every decoder accepts any bytes, never panics, and allocates no more than
// its documentation says. A failure is [ErrVersion] for something this build is too old to read and
// [ErrCorrupt] for everything else. Binary objects are canonical: bytes that decode are the bytes
// that encoding the result gives back, so equal content has an equal hash. Encoding something that
// could not be decoded again is a bug of the caller, and panics.
//
// docs/format.md specifies every byte.
//
// # Concurrency
//
// Values may be read by many goroutines at once; changing one needs exclusive use of it.
package manifest
