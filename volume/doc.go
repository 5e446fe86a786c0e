// Package volume is the block device: what a mount of a snapshot or a volume
// reads and writes.
//
// The nouns:
//
//   - A [Device] reads a snapshot's image through its base, the clean bytes
//     that all devices of the host opened from that snapshot share, and
//     fetches what is missing from the store.
//   - A [Volume] is a Device that also takes writes, into its write layer, and
//     makes snapshots of itself. It lives in a folder of the state directory,
//     which [Create] makes and one daemon at a time holds open.
//   - A view is what one read sees: the write layers and the root under them.
//     Cutting and committing a snapshot replace the view; reads in flight
//     finish on the one they began with.
//   - A cut is what a snapshot is made of: the sealed write layer over the root,
//     without what was written since.
//   - A flight is one block on its way from the store, for all who wait for it.
//
// The way of a read: write layers, then the clean layer for blocks that
// diverged from the base, else the base, then the store through the index. The
// way of a write: only into the open write layer. docs/consistency.md has the
// orders that make both safe, and record.go what a volume's folder says about
// them after a crash.
package volume
