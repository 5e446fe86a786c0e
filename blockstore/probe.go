package blockstore

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"
)

const (
	probeWriters = 8                // that race for one key
	probeCleanup = 30 * time.Second // for removing the probe's keys
)

// Probe proves, with a few small objects under "probe/" that it removes again,
// that the store honours the conditions of Put, alone and in a race, and that
// what was put is what Get, ReadRange and List then show. Its error names the
// promise that the store breaks. A store that ignores conditions looks right
// until two hosts commit at once, so nothing may rely on one that was not
// probed.
func Probe(ctx context.Context, s Store) (err error) {
	p := prober{s, "probe/" + rand.Text()}
	defer func() {
		// Also after a cancelled or failed probe, hence a context of its own.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeCleanup)
		defer cancel()
		err = errors.Join(err, s.Delete(ctx, p.key("create"), p.key("race")))
	}()
	for _, step := range []func(context.Context) error{p.create, p.read, p.replace, p.race, p.remove} {
		if err := step(ctx); err != nil {
			return fmt.Errorf("probe %s: %w", s, err)
		}
	}
	return nil
}

type prober struct {
	store  Store
	prefix string
}

func (p prober) key(name string) string { return p.prefix + "/" + name }

// create proves that IfAbsent creates once.
func (p prober) create(ctx context.Context) error {
	if _, err := p.store.Put(ctx, p.key("create"), []byte("first"), IfAbsent); err != nil && !errors.Is(err, ErrExists) {
		return fmt.Errorf("create an object with If-None-Match: %w", err) // (ErrExists: our own, its reply lost)
	}
	_, err := p.store.Put(ctx, p.key("create"), []byte("second"), IfAbsent)
	if err == nil {
		return errors.New("the store ignores If-None-Match: a second create of one key succeeded")
	}
	if !errors.Is(err, ErrExists) {
		return fmt.Errorf("create an object twice with If-None-Match: %w", err)
	}
	return nil
}

// read proves that the object created is the one that is read and listed.
func (p prober) read(ctx context.Context) error {
	data, etag, err := p.store.Get(ctx, p.key("create"), 1<<10)
	if err != nil {
		return err
	}
	if string(data) != "first" {
		return fmt.Errorf("the store returned %q for an object created as %q", data, "first")
	}
	part := make([]byte, 3)
	if err := p.store.ReadRange(ctx, p.key("create"), 1, part); err != nil {
		return err
	}
	if string(part) != "irs" {
		return fmt.Errorf("the store does not honour Range: it returned %q for bytes 1 to 3 of %q", part, data)
	}
	listed := 0
	err = p.store.List(ctx, p.prefix+"/", func(info Info) error {
		listed++
		if info.Key != p.key("create") || info.Size != int64(len(data)) || info.ETag != etag {
			return fmt.Errorf("the store listed %q, %d bytes, ETag %q, instead of %q, %d bytes, ETag %q",
				info.Key, info.Size, info.ETag, p.key("create"), len(data), etag)
		}
		return nil
	})
	if err == nil && listed != 1 {
		err = fmt.Errorf("the store listed %d objects where there is one", listed)
	}
	return err
}

// replace proves that IfMatch replaces only what it names.
func (p prober) replace(ctx context.Context) error {
	_, first, err := p.store.Get(ctx, p.key("create"), 1<<10)
	if err != nil {
		return err
	}
	if _, err := p.store.Put(ctx, p.key("create"), []byte("third"), IfMatch(first)); err != nil && !errors.Is(err, ErrChanged) {
		return fmt.Errorf("replace an object with If-Match: %w", err) // (ErrChanged: by ourselves, the reply lost; Get decides)
	}
	_, err = p.store.Put(ctx, p.key("create"), []byte("fourth"), IfMatch(first))
	if err == nil {
		return errors.New("the store ignores If-Match: it replaced an object that had changed")
	}
	if !errors.Is(err, ErrChanged) {
		return fmt.Errorf("replace a changed object with If-Match: %w", err)
	}
	data, _, err := p.store.Get(ctx, p.key("create"), 1<<10)
	if err == nil && string(data) != "third" {
		err = fmt.Errorf("the store returned %q for an object replaced with %q", data, "third")
	}
	return err
}

// race proves that of several creates at the same time one wins, and that the
// winner's data is what remains.
func (p prober) race(ctx context.Context) error {
	var (
		wg   sync.WaitGroup
		errs [probeWriters]error
	)
	for i := range errs {
		wg.Go(func() { _, errs[i] = p.store.Put(ctx, p.key("race"), []byte{byte(i)}, IfAbsent) })
	}
	wg.Wait()
	winners, winner := 0, 0
	for i, err := range errs {
		switch {
		case err == nil:
			winners, winner = winners+1, i
		case !errors.Is(err, ErrExists):
			return fmt.Errorf("race to create an object: %w", err)
		}
	}
	data, _, err := p.store.Get(ctx, p.key("race"), 1<<10)
	if err != nil {
		return err
	}
	// No winner at all: its reply was lost, and its retry met its own object.
	if winners > 1 || winners == 1 && !bytes.Equal(data, []byte{byte(winner)}) {
		return fmt.Errorf("the store does not create atomically with If-None-Match: %d of %d creates of one key at the same time succeeded, and it holds that of %v", winners, probeWriters, data)
	}
	return nil
}

// remove proves that an object deleted is gone, and that IfMatch does not bring
// it back.
func (p prober) remove(ctx context.Context) error {
	_, etag, err := p.store.Get(ctx, p.key("create"), 1<<10)
	if err != nil {
		return err
	}
	if err := p.store.Delete(ctx, p.key("create")); err != nil {
		return err
	}
	_, err = p.store.Put(ctx, p.key("create"), []byte("fifth"), IfMatch(etag))
	if err == nil {
		return errors.New("the store ignores If-Match: it brought back an object that was deleted")
	}
	if !errors.Is(err, ErrChanged) {
		return fmt.Errorf("replace a deleted object with If-Match: %w", err)
	}
	if _, _, err := p.store.Get(ctx, p.key("create"), 1<<10); err == nil {
		return errors.New("the store still returns an object that was deleted")
	} else if !errors.Is(err, ErrNotExist) {
		return err
	}
	return nil
}
