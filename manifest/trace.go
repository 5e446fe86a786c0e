package manifest

import (
	"encoding/binary"
	"fmt"
)

const (
	// MaxTraceBlocks bounds the blocks of a [Trace]: 512 GiB of blocks of the default size.
	MaxTraceBlocks = 1 << 20
	// MaxTraceLength bounds an encoded [Trace], in bytes.
	MaxTraceLength = traceHeaderLen + MaxTraceBlocks*binary.MaxVarintLen64 + ChecksumLen

	traceHeaderLen = ObjectHeaderLen + 4
)

func traceFormat() ObjectFormat { return ObjectFormat{Name: "trace", Magic: "LVTR", Version: 1} }

// A Trace is the blocks of a device in the order in which they were first touched, so that another
// host can fetch them in that order. It is advice: it may name blocks twice, or holes.
type Trace []int64

// Encode encodes a trace of at most [MaxTraceBlocks] blocks, each of which a device may have.
func (t Trace) Encode() ([]byte, error) {
	if len(t) > MaxTraceBlocks {
		return nil, fmt.Errorf("trace of %d blocks; %d is the most", len(t), MaxTraceBlocks)
	}
	b := traceFormat().AppendHeader(make([]byte, 0, traceHeaderLen+3*len(t)+ChecksumLen))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(t)))
	last := int64(-1)
	for _, block := range t {
		if block < 0 || block > maxTraceBlock {
			return nil, fmt.Errorf("trace has block %d; %d is the most", block, int64(maxTraceBlock))
		}
		// Most blocks are touched in address order: what comes next is 0, in one byte.
		b = binary.AppendVarint(b, block-last-1)
		last = block
	}
	return traceFormat().AppendChecksum(b), nil
}

// maxTraceBlock is the last block of the largest device with the smallest blocks.
const maxTraceBlock = MaxDeviceSize / MinBlockSize

// DecodeTrace decodes a trace. It keeps nothing of data. Its error wraps [ErrCorrupt] or
// [ErrVersion].
func DecodeTrace(data []byte) (Trace, error) {
	format := traceFormat()
	if err := format.CheckHeader(data); err != nil {
		return nil, err
	}
	if len(data) < traceHeaderLen+ChecksumLen || len(data) > MaxTraceLength {
		return nil, corrupt(format.Name, "%d bytes", len(data))
	}
	body, err := format.CutChecksum(data)
	if err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(body[ObjectHeaderLen:])
	rest := body[traceHeaderLen:]
	if int64(n) > int64(len(rest)) || n > MaxTraceBlocks { // a block takes a byte at least
		return nil, corrupt(format.Name, "%d blocks in %d bytes", n, len(rest))
	}
	t := make(Trace, 0, n)
	last := int64(-1)
	for range n {
		step, k := binary.Varint(rest)
		if k <= 0 || k > 1 && rest[k-1] == 0 { // cut short, too long, or not the shortest encoding
			return nil, corrupt(format.Name, "block %d of %d", len(t), n)
		}
		if step > maxTraceBlock || step < -maxTraceBlock-1 || last+1+step < 0 || last+1+step > maxTraceBlock {
			return nil, corrupt(format.Name, "block %d of %d is out of range", len(t), n)
		}
		last += 1 + step
		t, rest = append(t, last), rest[k:]
	}
	if len(rest) > 0 {
		return nil, corrupt(format.Name, "%d bytes left over", len(rest))
	}
	return t, nil
}
