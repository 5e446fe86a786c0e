package snapshot

import (
	"context"
	"fmt"
	"io"
	"sync"
)

// Export writes every block of the image that is not a hole to w, verified and
// clipped to the size of the device, by several WriteAt at once. What lies in
// between it leaves as it is: the caller sees to it that it is zeros there, and
// that w is as large as the device. progress, if set, is told after each block
// how many bytes of blocks are done, in ascending order. After an error w holds
// some of the blocks. Nothing is synced.
func (m *Image) Export(ctx context.Context, w io.WriterAt, progress func(done, total int64)) error {
	g := m.Geometry()
	blockSize := int64(g.BlockSize)
	total := m.Root.DataBlocks * blockSize
	var mu sync.Mutex // guards done, and the calls of progress
	var done int64
	err := m.readAll(ctx, func(block int64, data []byte) error {
		if _, err := w.WriteAt(data[:g.BlockLen(block)], block*blockSize); err != nil {
			return err
		}
		if progress != nil {
			mu.Lock()
			defer mu.Unlock()
			done += blockSize
			progress(done, total)
		}
		return nil
	}, nil)
	if err != nil {
		return fmt.Errorf("export %s: %w", m.ID(), err)
	}
	return nil
}
