package fs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// memory is a Device in memory whose operations, named "read", "write", "zero",
// "sync" and "seek", are counted and can be held up, slowed and made to fail.
type memory struct {
	readOnly bool

	size atomic.Int64 // of data

	dataMu sync.RWMutex // guards data
	data   []byte

	mu  sync.Mutex // guards ops
	ops map[string]*Operation
}

// Operation is the state of one kind of operation.
type Operation struct {
	Calls   int // that began
	Running int // that have not returned
	Peak    int // largest value of Running

	delay   time.Duration
	failing string        // what failure makes an error of
	held    chan struct{} // nil: go on at once; else when it is closed
}

func newMemory(data []byte, readOnly bool) *memory {
	m := &memory{readOnly: readOnly, data: data, ops: make(map[string]*Operation)}
	m.size.Store(int64(len(data)))
	for _, name := range []string{"read", "write", "zero", "sync", "seek"} {
		m.ops[name] = new(Operation)
	}
	return m
}

// content returns the bytes a device of a given seed starts with: all zeros for
// seed 0.
func content(size int64, seed byte) []byte {
	data := make([]byte, size)
	if seed != 0 {
		rand.NewChaCha8([32]byte{seed}).Read(data)
	}
	return data
}

// errHalf makes a read return half of what it should, and no error.
var errHalf = errors.New("read half")

// failure returns the error that a way to fail stands for.
func failure(how string) error {
	switch how {
	case "":
		return nil
	case "half":
		return errHalf
	case "plain":
		return errors.New("the store said no")
	case "expired":
		return fmt.Errorf("waiting for the store: %w", context.DeadlineExceeded)
	case "panic":
		panic("the device lost its mind")
	}
	for _, errno := range []syscall.Errno{unix.ENOSPC, unix.ENOSYS} {
		if unix.ErrnoName(errno) == how {
			return fmt.Errorf("trying to: %w", errno)
		}
	}
	panic("no such failure: " + how)
}

// do runs one operation: f, unless it is to fail.
func (m *memory) do(ctx context.Context, name string, f func()) error {
	m.mu.Lock()
	op := m.ops[name]
	op.Calls++
	op.Running++
	op.Peak = max(op.Peak, op.Running)
	held, delay, failing := op.held, op.delay, op.failing
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		op.Running--
		m.mu.Unlock()
	}()
	if held != nil {
		select {
		case <-held:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	time.Sleep(delay)
	if err := failure(failing); err != nil {
		return err
	}
	f()
	return nil
}

func (m *memory) Size() int64    { return m.size.Load() }
func (m *memory) ReadOnly() bool { return m.readOnly }

func (m *memory) ReadAt(ctx context.Context, p []byte, off int64) (n int, err error) {
	err = m.do(ctx, "read", func() {
		m.dataMu.RLock()
		defer m.dataMu.RUnlock()
		n = copy(p, m.data[off:])
	})
	switch {
	case errors.Is(err, errHalf):
		return len(p) / 2, nil
	case err == nil && off+int64(n) == m.Size():
		return n, io.EOF // as an io.ReaderAt may
	}
	return n, err
}

func (m *memory) WriteAt(ctx context.Context, p []byte, off int64) (n int, err error) {
	err = m.do(ctx, "write", func() {
		m.dataMu.Lock()
		defer m.dataMu.Unlock()
		n = copy(m.data[off:], p)
	})
	return n, err
}

func (m *memory) Zero(ctx context.Context, off, n int64) error {
	return m.do(ctx, "zero", func() {
		m.dataMu.Lock()
		defer m.dataMu.Unlock()
		clear(m.data[off : off+n])
	})
}

func (m *memory) Sync(ctx context.Context) error { return m.do(ctx, "sync", func() {}) }

func (m *memory) NextData(ctx context.Context, off int64) (next int64, err error) {
	err = m.do(ctx, "seek", func() { next = m.next(off, true) })
	if err == nil && next == m.Size() {
		return 0, io.EOF
	}
	return next, err
}

func (m *memory) NextHole(ctx context.Context, off int64) (next int64, err error) {
	err = m.do(ctx, "seek", func() { next = m.next(off, false) })
	return next, err
}

// next returns the first offset from off on that is in a page with data, or in
// one without; the size if there is none.
func (m *memory) next(off int64, data bool) int64 {
	m.dataMu.RLock()
	defer m.dataMu.RUnlock()
	const page = 4096
	for size := m.Size(); off < size; off = off/page*page + page {
		start := off / page * page
		empty := len(bytes.Trim(m.data[start:min(start+page, size)], "\x00")) == 0
		if empty != data {
			return off
		}
	}
	return m.Size()
}

// Allocated is what the Device may but need not have.
func (m *memory) Allocated() int64 { return m.Size() / 2 }
