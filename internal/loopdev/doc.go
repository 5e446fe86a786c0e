// Package loopdev attaches files as loop devices: block devices whose content
// is a file, the backing file.
//
// It exists because losetup leaves three things undone on which the speed of a
// device rests whose file takes milliseconds to read: it does not open the file
// with O_DIRECT, on which FUSE decides how many writes it lets through at once;
// it may leave a device behind, attached, when direct I/O is refused; and the
// readahead stays at what suits a local disk.
//
// Devices are named by path, as in "/dev/loop3". All functions need root. They
// are safe for concurrent use, by several processes as well.
package loopdev
