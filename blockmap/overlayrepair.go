package blockmap

import (
	"errors"
	"fmt"
)

// retired is a data file that was replaced, or merged into another. Views may show it
// until the pins of its level are gone.
type retired struct {
	pins pins
	file *dataFile
}

// retire keeps f, which is no longer the file of lv. o.syncing is held.
func (o *Overlay) retire(lv *level, f *dataFile) { o.retired = append(o.retired, retired{lv.pins, f}) }

// closeRetired closes the retired files that no view shows. o.syncing is held.
func (o *Overlay) closeRetired() (err error) {
	kept := o.retired[:0]
	for _, x := range o.retired {
		if x.pins.any() {
			kept = append(kept, x)
		} else {
			err = errors.Join(err, x.file.close())
		}
	}
	clear(o.retired[len(kept):])
	o.retired = kept
	return err
}

// replaceCut gives a level a new data file, if its own was cut short. What was in it is
// lost: reads of it fail, and never show zeros or the base in its place, until it is
// written again.
func (o *Overlay) replaceCut(lv *level) error {
	if !lv.cut() {
		return nil
	}
	o.syncing.Lock()
	defer o.syncing.Unlock()
	o.stripes.lockAll()
	defer o.stripes.unlockAll()
	f := lv.file.Load()
	if f == nil || f.intact() {
		return nil
	}
	if err := o.poison.Load(); err != nil {
		return *err
	}
	// The map says so first, durably. The next open makes a file where the map needs none.
	n, err := lv.m.loseData()
	if err != nil {
		return o.poisonBy("the map", err)
	}
	o.log.Error("a data file of the overlay was cut short, and what was written there is lost; reads of it fail until it is written again", "file", lv.name, "bytes", n)
	made, err := o.makeData(lv)
	if err != nil {
		return o.poisonBy("a new data file", err)
	}
	lv.file.Store(made)
	o.retire(lv, f)
	return o.closeRetired()
}

// makeData makes a data file for a level whose map has no data. The file becomes durable
// with the first data: an open makes another one where the map needs none.
func (o *Overlay) makeData(lv *level) (f *dataFile, err error) {
	if o.temp {
		return tempData(o.fs, o.dir, o.size)
	}
	if err := o.fs.RemoveAll(lv.name); err != nil {
		return nil, err
	}
	if f, err = createData(o.fs, lv.name, o.size); err != nil {
		return nil, err
	}
	if err = o.fs.SyncDir(o.dir); err == nil && lv.m.liveFile != nil {
		lv.m.data = f.id
		err = lv.m.writeHead(o.boot)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make %s: %w", lv.name, err), f.close())
	}
	return f, nil
}
