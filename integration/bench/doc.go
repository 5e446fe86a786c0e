// Command bench measures lazyvol beside the raw file and the peers that are
// installed, in one run on one machine, and prints the table of
// docs/performance.md as Markdown. Its nouns:
//
// A system serves the same image as one file: lazyvol, the raw file itself,
// qemu's FUSE export of a local file (both limits, not peers), and s3backer, qemu over
// HTTP, rclone and nbdkit. A row is what is measured, and its bars: what of
// lazyvol's figures is compared with whose. A figure is the median of the samples
// that the rounds took; within a round the systems take turns, row by row, so
// that a machine that drifts does so under all of them.
//
// All bytes lie in one S3 server, versitygw. Between it and everybody stands
// toxiproxy, which holds back each response for some milliseconds, and before that the tap,
// which is in this process: it counts requests and those in flight, and lets
// the bodies through inside the kernel.
//
// It needs root, /dev/fuse, loop devices, fio and what scripts/bench-setup
// installs. Whatever it starts, mounts and attaches it takes away, also when
// it is interrupted.
package main
