package loopdev

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// A Partition is a part of a device, as the kernel found it in its partition
// table.
type Partition struct {
	Number int
	Path   string // the device of it: /dev/loop3p1
	Size   int64  // in bytes
	Name   string // what a GPT calls it, "" if it has no name
}

// sector is the unit in which sysfs has sizes, whatever the device's own is.
const sector = 512

// Partitions returns the partitions of a device that was attached with PartScan, in
// the order of their numbers; none is no error. Where nobody makes nodes for
// them, as in containers, it does.
func Partitions(dev string) ([]Partition, error) {
	name := filepath.Base(dev)
	files, err := filepath.Glob(attributePath(dev, name+"p*/partition"))
	if err != nil {
		return nil, err
	}
	var found []Partition
	for _, file := range files {
		p, err := partition(dev, filepath.Base(filepath.Dir(file)))
		if err != nil {
			return nil, fmt.Errorf("partitions of %s: %w", dev, err)
		}
		found = append(found, p)
	}
	slices.SortFunc(found, func(a, b Partition) int { return cmp.Compare(a.Number, b.Number) })
	return found, nil
}

// partition looks up the partition that has a name such as loop3p1.
func partition(dev, name string) (p Partition, err error) {
	number, err := attribute(dev, name+"/partition")
	if err != nil {
		return p, err
	}
	if p.Number, err = strconv.Atoi(number); err != nil {
		return p, err
	}
	sectors, err := attribute(dev, name+"/size")
	if err != nil {
		return p, err
	}
	if p.Size, err = strconv.ParseInt(sectors, 10, 64); err != nil {
		return p, err
	}
	p.Size *= sector
	event, err := attribute(dev, name+"/uevent")
	if err != nil {
		return p, err
	}
	for line := range strings.Lines(event) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "PARTNAME="); ok {
			p.Name = name
		}
	}
	device, err := attribute(dev, name+"/dev")
	if err != nil {
		return p, err
	}
	p.Path = filepath.Join(filepath.Dir(dev), name)
	return p, makeNode(p.Path, device)
}

// Numbers returns the device numbers, such as "7:3", of a device and of its
// partitions.
func Numbers(dev string) ([]string, error) {
	files, err := filepath.Glob(attributePath(dev, filepath.Base(dev)+"p*/dev"))
	if err != nil {
		return nil, err
	}
	var numbers []string
	for _, file := range append(files, attributePath(dev, "dev")) {
		number, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("device numbers of %s: %w", dev, err)
		}
		numbers = append(numbers, strings.TrimSpace(string(number)))
	}
	return numbers, nil
}

// Whole returns the device of which dev is a partition, and dev itself if it is none.
// Symbolic links, such as those in /dev/disk, are followed.
func Whole(dev string) string {
	if path, err := filepath.EvalSymlinks(dev); err == nil {
		dev = path
	}
	path, err := filepath.EvalSymlinks(filepath.Join("/sys/class/block", filepath.Base(dev)))
	if err != nil {
		return dev
	}
	if _, err := os.Stat(filepath.Join(path, "partition")); err != nil {
		return dev
	}
	return filepath.Join(filepath.Dir(dev), filepath.Base(filepath.Dir(path)))
}

// Attached returns all loop devices that are attached to something, whosever
// they are, in no particular order.
func Attached() (devs []string, err error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		devs = append(devs, filepath.Join("/dev", filepath.Base(filepath.Dir(filepath.Dir(file)))))
	}
	return devs, nil
}
