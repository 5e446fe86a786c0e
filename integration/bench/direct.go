package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// alignedBuffer returns memory as O_DIRECT wants it.
func alignedBuffer(n int) []byte {
	b := make([]byte, n+pageSize)
	skip := pageSize - int(uintptr(unsafe.Pointer(&b[0]))%pageSize)
	return b[skip : skip+n : skip+n]
}

// A pager reads and writes single pages of a file, past the page cache.
type pager struct {
	f    *os.File
	page []byte
}

func openPager(path string, flags int) (*pager, error) {
	f, err := os.OpenFile(path, flags|unix.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	return &pager{f, alignedBuffer(pageSize)}, nil
}

// readAll reads a file from its beginning to its end, past its page cache or through
// it. What a system keeps may have left the page cache since it was last read: some
// virtual machines give memory back that was not used for half a minute.
func readAll(ctx context.Context, path string, direct bool) (err error) {
	flags := os.O_RDONLY
	if direct {
		flags |= unix.O_DIRECT
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buffer := alignedBuffer(1 << 20)
	for ctx.Err() == nil {
		_, err := f.Read(buffer)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read all of %s: %w", path, err)
		}
	}
	return context.Cause(ctx)
}

// read reads the page at off and returns how long that took.
func (p *pager) read(off int64) (time.Duration, error) {
	begin := time.Now()
	n, err := p.f.ReadAt(p.page, off)
	took := time.Since(begin)
	if err != nil || n != pageSize {
		return took, fmt.Errorf("read %d bytes of the page at %d of %s: %w", n, off, p.f.Name(), err)
	}
	return took, nil
}

// write writes the page at off and returns how long that took.
func (p *pager) write(off int64) (time.Duration, error) {
	begin := time.Now()
	if _, err := p.f.WriteAt(p.page, off); err != nil {
		return 0, err
	}
	return time.Since(begin), nil
}

func (p *pager) close(err *error) { *err = errors.Join(*err, p.f.Close()) }
