// Package cache keeps a volume's bytes on its host.
//
//   - A page is 4 KiB of a device, the unit in which layers know what they hold.
//   - A layer is a folder with a sparse file as large as the device and a map of
//     which of its pages count.
//   - A [WriteLayer] holds what was written since the last cut. Its pages are
//     [Absent], [Data] or [Zero]; it is the only copy of them, so its map is a
//     journal that survives a killed daemon and a power cut.
//   - A [Clean] layer holds copies of blocks the store has too: the base that all
//     volumes of a snapshot share, or the diverged blocks of one volume. Every page
//     carries a checksum, and whatever does not match is simply not there.
//   - [Leaves] keeps decoded leaves of the index in memory, an [IndexFile] keeps
//     them on disk.
//   - [Diverged] is the set of blocks that must no longer be looked up in the base.
//
// All files are reached through [vfs.FS]. Nothing here talks to a store.
package cache
