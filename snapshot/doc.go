// Package snapshot is the protocol by which any number of hosts begin, commit,
// open, delete and reclaim snapshots in one object store, coordinated by
// nothing but that store's create-once keys.
//
// The nouns:
//
//   - A [Store] is an object store that holds lineages of snapshots.
//   - An [Attempt] is a snapshot on its way: begun with an intent, uploaded
//     from a [Source], and ended by an outcome, committed or aborted, of which
//     the store keeps exactly one. [Store.Create] takes it all the way.
//   - A [FileSource] is an image file or a block device as a source.
//   - An [Image] is a committed snapshot opened for reading, and usually pinned
//     meanwhile: a pin keeps everything the image refers to, even after the
//     snapshot is deleted.
//   - A root is a snapshot whose footer says what is live in its lineage: one
//     that is not deleted, or pinned, or the parent of a pending one. Reclaim
//     removes what no root refers to any more.
//   - A [Verifier] checks that what the store holds is what was uploaded.
//
// The order of the store calls in each operation is what makes it safe;
// docs/consistency.md has the argument, and every call site names the rule it
// keeps.
package snapshot
