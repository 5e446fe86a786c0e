package main

import (
	"context"
	"fmt"
	"path/filepath"
)

// plainName and what lazyvolName is in these rows: the same image in a lineage that is
// not encrypted, and in one that is.
const plainName = "lazyvol, not encrypted"

func sealedRows() []row {
	at := func(depth int) row {
		j := job{rw: "randread", block: "4k", depth: depth, warm: true}
		return row{fmt.Sprintf("sealed-random-%d", depth), fmt.Sprintf("warm 4 KiB O_DIRECT of an encrypted snapshot, QD%d", depth), sealedReads(j), []bar{
			{text: "≥ 0.6 × one that is not encrypted", unit: iops, got: of(lazyvolName, iops), refs: []key{of(plainName, iops)}, factor: 0.6},
		}}
	}
	return []row{at(1), at(16)}
}

// sealedReads reads a plain and an encrypted snapshot of the image, both complete.
func sealedReads(j job) func(context.Context, *turn) error {
	return func(ctx context.Context, r *turn) error {
		h, err := r.newHost(r.server.direct)
		if err != nil {
			return err
		}
		key, err := h.run(ctx, "key", "generate", filepath.Join(h.dir, "key"))
		if err != nil {
			return err
		}
		sealed, err := h.run(ctx, "snapshot", "create", "--key", key, r.image.path)
		if err != nil {
			return err
		}
		for _, s := range []struct{ name, snap string }{{plainName, r.snap}, {lazyvolName, sealed}} {
			m, err := r.mount(ctx, h, s.snap)
			if err != nil {
				return err
			}
			if err := readAll(ctx, m.image, true); err != nil { // fetches what is missing
				return err
			}
			if err := m.hydrated(ctx); err != nil {
				return err
			}
			found, err := r.fio(ctx, m.image, j)
			if err != nil {
				return err
			}
			r.record(s.name, iops, found.iops)
			m.stop()
		}
		_, err = h.run(ctx, "snapshot", "delete", sealed)
		return err
	}
}
