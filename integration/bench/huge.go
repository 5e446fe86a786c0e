package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"github.com/aws/aws-sdk-go-v2/credentials"
	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// smallName is the snapshot of the image, beside the huge one.
const smallName = "the image's snapshot"

func hugeRows() []row {
	return []row{{"huge", "a snapshot of 16 TiB (15 on ext4), every leaf present", huge, []bar{
		{text: "mounts in ≤ 1.2 × the time of the image's", unit: ms, got: of(lazyvolName, ms), refs: []key{of(smallName, ms)}, less: true, factor: 1.2},
		{text: "first read of any block ≤ 3 round trips more", unit: roundTrips, got: of(lazyvolName, roundTrips), refs: []key{of(smallName, roundTrips)}, less: true, factor: 1, plus: 3},
		{text: "RSS ≤ 150 MiB", unit: "MiB", got: of(lazyvolName, memory), fixed: 150, less: true, factor: 1},
	}}}
}

// hugeSize is 16 TiB, or what fits where files end just below that.
func (b *bench) hugeSize() (int64, error) {
	const ext4 = 0xef53
	var st unix.Statfs_t
	if err := unix.Statfs(b.dir, &st); err != nil {
		return 0, err
	}
	if st.Type == ext4 {
		return 15 << 40, nil
	}
	return 16 << 40, nil
}

// huge mounts a synthetic snapshot beside the image's, in turns, and reads from
// leaves all over it.
func huge(ctx context.Context, r *turn) error {
	size, err := r.hugeSize()
	if err != nil {
		return err
	}
	id, err := r.makeHuge(ctx, size)
	if err != nil {
		return fmt.Errorf("make the snapshot: %w", err)
	}
	const mounts = 3
	for range mounts {
		if err := r.mountAndRead(ctx, smallName, r.snap, r.stored.pages(uint64(r.number))[:2]); err != nil {
			return err
		}
		random := rand.New(rand.NewPCG(12, uint64(r.number)))
		pages := make([]int64, r.reads())
		for i := range pages {
			pages[i] = random.Int64N(size/pageSize) * pageSize
		}
		if err := r.mountAndRead(ctx, lazyvolName, id, pages); err != nil {
			return err
		}
	}
	return nil
}

func (r *turn) mountAndRead(ctx context.Context, name, id string, pages []int64) (err error) {
	h, err := r.farHost()
	if err != nil {
		return err
	}
	passed, begin := r.server.tap.watch(), time.Now()
	m, err := h.mount(ctx, id, "--no-hydrate")
	if err != nil {
		return err
	}
	r.record(name, ms, milliseconds(time.Since(begin)))
	r.record(name, "round trips of the mount", float64(passed.traffic().roundTrips()))
	defer m.stop()
	f, err := openPager(m.image, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.close(&err)
	most := 0
	for _, page := range pages {
		passed := r.server.tap.watch()
		if _, err := f.read(page); err != nil {
			return err
		}
		most = max(most, passed.traffic().roundTrips())
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	r.record(name, roundTrips, float64(most))
	kib, err := procValue(m.pid, "status", "VmHWM")
	if err == nil {
		r.record(name, memory, float64(kib)/1024)
	}
	return err
}

// makeHuge stores a snapshot every leaf of which is full. The blocks are those
// of a single pack, over and over again: what a mount and a read do depends on
// how many leaves there are, not on what else their blocks refer to.
func (r *turn) makeHuge(ctx context.Context, size int64) (string, error) {
	store, err := blockstore.NewS3(ctx, blockstore.S3Config{
		Bucket: storeBucket, Prefix: storePrefix, Region: "us-east-1", Endpoint: r.server.direct,
		Credentials: credentials.NewStaticCredentialsProvider(r.server.accessKey, r.server.secretKey, ""),
	})
	if err != nil {
		return "", err
	}
	lineage := manifest.NewLineageID()
	id := manifest.NewSnapshotID(lineage)
	pack, refs, err := r.packOfImage(id)
	if err != nil {
		return "", err
	}
	g := manifest.Geometry{Size: size, BlockSize: r.stored.size}
	root := &manifest.Root{Snapshot: id, Geometry: g, DataBlocks: g.Blocks()}
	var stream []byte
	kinds := make([]manifest.LeafRef, len(refs)) // each begins at another block of the pack
	for kind := range kinds {
		leaf := manifest.NewLeaf(manifest.LeafBlocks)
		for i := range leaf.Len() {
			leaf.Set(i, refs[(i+kind)%len(refs)])
		}
		kinds[kind] = manifest.LeafRef{Owner: id.Serial, Offset: int64(len(stream)), Hash: leaf.Hash()}
		stream = append(stream, leaf.Encode()...)
	}
	for l := range g.Leaves() {
		ref := kinds[int(l)%len(kinds)]
		ref.Leaf = l
		root.Leaves = append(root.Leaves, ref)
	}
	now := time.Now().UTC().Truncate(time.Second)
	encoded := root.Encode()
	nonce := manifest.NewNonce()
	outcome := manifest.Outcome{
		Version: manifest.RecordVersion, Snapshot: id, State: manifest.StateCommitted, Nonce: nonce, Size: size, BlockSize: g.BlockSize,
		Start: now, End: now, RootHash: manifest.HexHash(root.Hash()), RootLength: int64(len(encoded)),
		DataBlocks: root.DataBlocks, UploadedBlocks: int64(len(refs)), StoredBytes: int64(len(pack) + len(stream) + len(encoded)),
		LeavesLength: int64(len(stream)), Packs: 1,
	}
	if len(encoded) <= manifest.InlineRootMax {
		outcome.Root = encoded
	}
	records := []struct {
		key    string
		record any
	}{
		{manifest.LineageKey(lineage), manifest.LineageRecord{Version: manifest.RecordVersion, ID: lineage, BlockSize: g.BlockSize, Created: now}},
		{manifest.IntentKey(id), manifest.Intent{Version: manifest.RecordVersion, Snapshot: id, Size: size, BlockSize: g.BlockSize, Nonce: nonce, Start: now}},
		{manifest.OutcomeKey(id), outcome},
	}
	objects := map[string][]byte{manifest.PackKey(id, 0): pack, manifest.LeavesKey(id, 0): stream, manifest.RootKey(id): encoded}
	for _, e := range records {
		if objects[e.key], err = manifest.EncodeRecord(e.record); err != nil {
			return "", err
		}
	}
	for key, data := range objects {
		if _, err := store.Put(ctx, key, data, blockstore.IfAbsent); err != nil {
			return "", err
		}
	}
	return id.String(), nil
}

// packOfImage makes a pack of the first blocks of the image.
func (r *turn) packOfImage(id manifest.SnapshotID) ([]byte, []manifest.Ref, error) {
	const blocks = 48
	f, err := os.Open(r.image.path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	builder := blockstore.NewPackBuilder(id, 0, r.stored.size, nil)
	var compressor blockstore.Compressor
	block, room := make([]byte, r.stored.size), make([]byte, r.stored.size)
	for _, number := range r.stored.blocks[:min(blocks, len(r.stored.blocks))] {
		if builder.Full() {
			break
		}
		if _, err := f.ReadAt(block, number*int64(r.stored.size)); err != nil {
			return nil, nil, err
		}
		stored, raw := compressor.Compress(room, block)
		builder.Add(number, manifest.Sum(block), stored, raw)
	}
	pack, refs := builder.Finish()
	return pack, refs, nil
}
