// Package vfs is the narrow door through which lazyvol touches local files.
//
// An [FS] names files and folders, a [File] is one open file. Only the calls the
// caches and volumes need exist, each with a stated durability, so that a twin
// which simulates power cuts and failing disks can take the place of the real
// filesystem in tests ([Crash]).
//
// Three things are durable only when asked for, as on Linux: a file's bytes and
// size after [File.Sync], and the names in a folder (created, renamed, removed)
// after [FS.SyncDir] of that folder.
package vfs
