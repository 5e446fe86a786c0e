package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/lazyvol/lazyvol/hydrate"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/volume"
)

// A second snapshot at once is refused, and no reason to wake anybody.
func TestARefusedSnapshotHasNotFailed(t *testing.T) {
	m := &monitor{}
	first, second := m.snapshotBegins(), m.snapshotBegins()
	second(fmt.Errorf("%w: vol-1", volume.ErrBusy))
	if m.failed != 0 || m.lastFail != nil || m.making.Load() != 1 {
		t.Errorf("refused: %d failed, the last with %v; %d are being made", m.failed, m.lastFail, m.making.Load())
	}
	first(errors.New("the disk is full"))
	if m.failed != 1 || m.lastFail == nil || m.making.Load() != 0 {
		t.Errorf("failed: %d failed, the last with %v; %d are being made", m.failed, m.lastFail, m.making.Load())
	}
	m.snapshotBegins()(nil)
	if m.failed != 1 || m.lastFail != nil || m.made.Load() != 1 {
		t.Errorf("made: %d failed, the last with %v, %d made", m.failed, m.lastFail, m.made.Load())
	}
}

// oneRun is a source with one run of so many stored bytes.
type oneRun uint32

func (n oneRun) runs() []manifest.Run {
	return []manifest.Run{{Blocks: []int64{0}, Refs: []manifest.Ref{{Length: uint32(n)}}}}
}

func (n oneRun) Plan(_ context.Context, leaf int64) ([]manifest.Run, int64, error) {
	if leaf > 0 {
		return nil, 0, io.EOF
	}
	return n.runs(), 1, nil
}
func (n oneRun) PlanBlocks(context.Context, []int64) ([]manifest.Run, error) { return n.runs(), nil }
func (n oneRun) Warm(context.Context, manifest.Run) error                    { return nil }

func TestWhatATraceBringsCountsAsFetchedInTheBackground(t *testing.T) {
	d := &daemon{
		replay:   hydrate.New(oneRun(1000), hydrate.Options{Blocks: []int64{0}}),
		hydrator: hydrate.New(oneRun(20), hydrate.Options{}),
	}
	if err := errors.Join(d.replay.Run(t.Context()), d.hydrator.Run(t.Context())); err != nil {
		t.Fatal(err)
	}
	if fetched, failed := d.background(); fetched != 1020 || failed != 0 {
		t.Errorf("%d bytes and %d failures", fetched, failed)
	}
	d.replay = nil
	if fetched, _ := d.background(); fetched != 20 {
		t.Errorf("%d bytes without a trace", fetched)
	}
}
