// Package fs shows one block device as a file, through FUSE.
//
// A Device is what is shown: bytes that can be read, written, zeroed and
// synced. Mount puts it on a directory, the mountpoint, as
//
//	DIR/volume.img    the image: the device's bytes, its size fixed
//	DIR/status.json   the status: what Options.Status returned when it was opened
//
// and returns a Server, which answers the kernel until the mount is gone. A
// mountpoint whose daemon died without unmounting is dead: every access to it
// fails with ENOTCONN until Recover has removed it.
//
// # What the image promises
//
// The image behaves as a disk would. Reads and writes may have any offset and
// length, also through O_DIRECT. The end is hard: reads stop there and writes
// get ENOSPC. fsync reaches Device.Sync every time and reports its error.
// fallocate punches holes and zeroes ranges, SEEK_DATA and SEEK_HOLE find them,
// and BLKGETSIZE64 answers. What a disk cannot do is refused with EPERM: the
// size cannot be changed, nor mode and owner, and neither file can be removed.
// So opening with O_TRUNC fails as well: dd needs conv=notrunc, qemu-img -n.
//
// A reader never gets bytes the Device did not deliver: a Device that fails, or
// returns fewer bytes than asked, is EIO, never zeros. Signals that do not kill
// the caller do not disturb its request; see patience.go.
//
// # Handles and the page cache
//
// A file opened with O_DIRECT gets a direct handle: requests go to the Device as
// they are, many at once, reads and writes alike. Any other open gets a buffered
// handle, whose reads and mappings go through the kernel's page cache. The cache
// outlives handles, so a second reading is local. It is write-through: a
// write(2) that has returned is in the Device. coherence.go says how the cache
// learns of direct writes.
//
// # Only Linux
//
// The package needs /dev/fuse and a kernel with FUSE protocol 7.28 or newer
// (Linux 4.20), and for users other than root the setuid helper fusermount3.
//
// The mounting process must not use its own mount: a thread that waits for
// itself cannot be helped.
package fs
