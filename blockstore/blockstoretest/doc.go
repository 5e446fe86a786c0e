// Package blockstoretest tests object stores, and tests with object stores.
//
// [Run] is the suite that every [blockstore.Store] passes. [S3Server] is a real
// S3 server for the duration of a test, which can be stopped, frozen and
// started again, and shared with child processes. [Faulty] is a store that
// fails, stalls, loses replies and damages data at the calls a test names, and
// counts them all.
package blockstoretest
