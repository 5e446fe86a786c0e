// Package integration tests lazyvol from the outside: the built binary, run as
// its users run it, with FUSE mounts in processes of their own, loop devices,
// ext4 and xfs, fio, and a real S3 server.
//
// The nouns of its harness: a store is where snapshots go, a folder or a bucket; a
// host is a machine as lazyvol sees it, which is a state directory and an
// environment; a mount is a daemon and its mountpoint. Whatever a test makes is taken
// away when it ends, and the whole package runs in a sandbox of its own mounts
// and processes, which ends with it whatever happens (sandbox_test.go).
//
// It needs root, /dev/fuse, loop devices, e2fsprogs, xfsprogs and fio.
//
//	LAZYVOL_BINARY=path  tests this binary instead of building one
//	LAZYVOL_RACE=1       builds it with the race detector for all tests, not just the randomised
//	LAZYVOL_STRESS=1     gives the randomised tests many times longer
//	LAZYVOL_SEED=n       repeats one run of a randomised test
package integration
